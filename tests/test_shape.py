"""config.json: megafork reads it as transformers does; anything that would be a different model is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import LLAMA3, MODELS, YARN

from megafork.model.rope import inverse_frequencies, softmax_scale
from megafork.recipe import Parallel, RecipeError
from megafork.shape import FAMILIES, Shape, Yarn, check_layout, read_dtype, read_shape

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "vocab_size": 99,
}
TYPES = {name: family.model_type for name, family in FAMILIES.items()}
MOE: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def wrote(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def shape_of(folder: Path, **changes: Any) -> Shape:
    return read_shape(wrote(folder, json.dumps({**BASE, **changes})))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        shape_of(folder, **changes)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 500 and str(folder) in said
    return said


# ---- the same as transformers, whatever is left out, null, or said twice

ABSENT = object()


def maybe(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((ABSENT, *values))


def keys(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(strategies).map(lambda drawn: {name: value for name, value in drawn.items() if value is not ABSENT})


def named(kind: str) -> st.SearchStrategy[dict[str, str]]:
    """The type, by its new name, its old one, or both."""
    return st.sampled_from([{"rope_type": kind}, {"type": kind}, {"type": kind, "rope_type": kind}])


THETAS = maybe(10000, 10000.0, 1e6, 500000)


def configs(*positions: int) -> st.SearchStrategy[dict[str, Any]]:
    """Config files of every form; `positions`: those that they may name."""
    llama3 = keys(
        factor=st.sampled_from([8, 32.0]),
        low_freq_factor=st.sampled_from([1.0, 2]),
        high_freq_factor=st.sampled_from([4.0, 16]),
        original_max_position_embeddings=maybe(*positions),
        rope_theta=THETAS,
    )
    yarn = keys(
        factor=st.sampled_from([1, 1.5, 4, 4.0, 40.0]),
        original_max_position_embeddings=maybe(*positions),
        attention_factor=maybe(None, 0.8, 1, 1.25),
        mscale=maybe(None, 1.0, 0.707),
        mscale_all_dim=maybe(None, 1, 0.5),
        beta_fast=maybe(32, 16.5, 1),
        beta_slow=maybe(1, 2.0),
        truncate=maybe(True, False),
        rope_theta=THETAS,
    )
    kinds = {"default": keys(rope_theta=THETAS), "llama3": llama3, "yarn": yarn}
    ropes = st.one_of(
        st.sampled_from([ABSENT, None, {}]),
        keys(rope_theta=THETAS, partial_rotary_factor=maybe(1.0)),
        *(st.tuples(named(kind), rest).map(lambda both: {**both[0], **both[1]}) for kind, rest in kinds.items()),
    )
    return keys(
        architectures=st.sampled_from([[name] for name in TYPES]),
        hidden_size=st.sampled_from([1024, 4096]),
        num_attention_heads=st.sampled_from([32, 64]),
        intermediate_size=st.just(96),
        num_hidden_layers=st.just(2),
        vocab_size=st.just(99),
        num_key_value_heads=maybe(None, 2, 32),
        head_dim=maybe(None, 32, 128),
        max_position_embeddings=maybe(*positions),
        rms_norm_eps=maybe(1e-5, 1e-6),
        tie_word_embeddings=maybe(True, False),
        rope_theta=THETAS,
        rope_scaling=ropes,
        rope_parameters=ropes,
        original_max_position_embeddings=maybe(64, 4096),
        partial_rotary_factor=maybe(None, 1.0),
        sliding_window=maybe(None, 4096, 1 << 20),
    ).map(lambda config: {**config, "model_type": TYPES[config["architectures"][0]]})


CONFIGS = configs(32, 512, 8192, 32768)
MIXTURES = keys(
    num_hidden_layers=st.sampled_from([1, 4]),
    num_key_value_heads=maybe(None, 2),
    head_dim=maybe(None, 32),
    num_experts=maybe(None, 4, 64),
    num_local_experts=maybe(4, 64),
    num_experts_per_tok=maybe(1, 2, 8),
    moe_intermediate_size=maybe(None, 32),
    norm_topk_prob=maybe(True, False, None, 1),
    decoder_sparse_step=maybe(1, 2, 3),
    mlp_only_layers=maybe(None, [], [0], [1, 3], [2, 2]),
    router_aux_loss_coef=maybe(0.0, 0.01, 1),
    output_router_logits=maybe(True, False),
    sliding_window=maybe(None, 4096),
    layer_types=maybe(None),
).map(lambda drawn: {**BASE, **MOE, **drawn})
REFUSED_THOUGH_TRANSFORMERS_READS_IT = (
    "its head_dim is None",
    "its partial_rotary_factor is None",
    "its rope_parameters.rope_theta is ",
    "its sliding_window is ",
    "delete the wrong one of the two",
    "with norm_topk_prob the weight of",
    "leaves no layer with experts",
    "must be a list of layers of the model",
    "; give at most as many",  # transformers reads it, and cannot compute with it
)


def theirs(folder: Path) -> dict[str, Any]:
    """What transformers computes with; {} where it refuses."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        rope = LlamaRotaryEmbedding(config)
        values: dict[str, Any] = {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "ffn": config.intermediate_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
            "vocab": config.vocab_size,
            "tied": config.tie_word_embeddings,
            "norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
        }
        if config.model_type == "qwen3_moe":
            values["moe"] = (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob)
            values["sparse"] = _sparse(config)
        values["window"] = config.sliding_window if config.model_type in ("mistral", "phi3") else None
        return {**values, "frequencies": rope.inv_freq, "factor": rope.attention_scaling, "rope": config.rope_parameters}
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError):
        return {}


def _sparse(config: Any) -> tuple[int, ...]:
    """The layers in which transformers builds experts."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeSparseMoeBlock

    with torch.device("meta"):
        layers = [Qwen3MoeDecoderLayer(config, number) for number in range(config.num_hidden_layers)]
    return tuple(number for number, layer in enumerate(layers) if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock))


def check_same(folder: Path, shape: Shape) -> None:
    wanted = theirs(folder)
    assert wanted, "transformers cannot read it"
    for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied", "norm_eps", "rope_theta"):
        assert getattr(shape, name) == wanted[name], name
    if shape.moe is not None:
        assert (shape.moe.experts, shape.moe.per_token, shape.moe.ffn, shape.moe.normalized) == wanted["moe"]
        assert shape.moe.layers == wanted["sparse"]
    assert wanted["window"] is None or wanted["window"] >= shape.max_positions, "attention to everything"
    assert torch.equal(inverse_frequencies(shape), wanted["frequencies"])
    assert softmax_scale(shape) == pytest.approx(wanted["factor"] ** 2 * shape.head_dim**-0.5, rel=1e-12)
    if shape.rope_scaling is not None:
        assert shape.rope_scaling.original_positions == wanted["rope"]["original_max_position_embeddings"]


def check_form(config: dict[str, Any]) -> None:
    """It is read as transformers reads it, or refused."""
    with tempfile.TemporaryDirectory() as name:
        folder = wrote(Path(name), json.dumps(config))
        try:
            shape = read_shape(folder)
        except RecipeError as error:
            assert any(said in str(error) for said in REFUSED_THOUGH_TRANSFORMERS_READS_IT) or not theirs(folder), error
            return
        check_same(folder, shape)


@settings(max_examples=400)
@given(CONFIGS)
def test_every_form_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    check_form(config)


@settings(max_examples=100)
@given(MIXTURES)
def test_every_mixture_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    check_form(config)


ODD = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 2.5, -0.5, 1e-9, 1e300, 10**400, "8", "yarn", "linear", "dynamic", [], [1], {}, {"a": 1}]
)
_NUMBERS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_size",
    "vocab_size",
)
_MORE = (
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
)
_WITHIN = (
    "factor",
    "rope_type",
    "type",
    "rope_theta",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
)


@settings(max_examples=600)
@given(
    CONFIGS, st.sampled_from([*_NUMBERS, *_MORE, *_WITHIN, "truncate", "original_max_position_embeddings", "partial_rotary_factor"]), ODD
)
def test_an_odd_value_is_read_as_transformers_reads_it_or_refused(config: dict[str, Any], key: str, value: Any) -> None:
    for inner in (config, config.get("rope_scaling"), config.get("rope_parameters")):
        if inner and (inner is config) == (key not in _WITHIN):
            inner[key] = value
    with tempfile.TemporaryDirectory() as name:
        folder = wrote(Path(name), json.dumps(config))
        try:
            shape = read_shape(folder)
        except RecipeError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            return
        check_same(folder, shape)


@pytest.mark.slow
@settings(max_examples=100)
@given(configs(32, 512))
def test_every_form_is_read_as_vllm_reads_it(config: dict[str, Any]) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import get_config

    with tempfile.TemporaryDirectory() as name:
        folder = wrote(Path(name), json.dumps(config))
        try:
            shape = read_shape(folder)
        except RecipeError:
            return
        read = get_config(folder, trust_remote_code=False)
    with set_current_vllm_config(VllmConfig()):
        cache = get_rope(shape.head_dim, max_position=read.max_position_embeddings, rope_parameters=read.rope_parameters).cos_sin_cache
    if shape.rope_scaling is None or isinstance(shape.rope_scaling, Yarn):
        assert len(cache) >= shape.max_positions, "no position that megafork lets through is beyond vLLM's table"
    turned = torch.outer(torch.arange(64.0), inverse_frequencies(shape))
    factor = (softmax_scale(shape) * shape.head_dim**0.5) ** 0.5
    torch.testing.assert_close(cache[:64], (torch.cat((turned.cos(), turned.sin()), -1) * factor)[: len(cache)], atol=1e-6, rtol=0)


# ---- what people have


@pytest.mark.parametrize("name", MODELS)
def test_public_models_are_accepted(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    shape = read_shape(wrote(tmp_path, json.dumps(config)))
    check_same(tmp_path, shape)
    yarn = isinstance(shape.rope_scaling, Yarn)
    assert shape.max_positions == (131072 if yarn else config["max_position_embeddings"])
    assert read_dtype(tmp_path) == config["torch_dtype"]


@pytest.mark.parametrize("architecture", TYPES)
def test_what_transformers_writes_is_accepted(architecture: str, tmp_path: Path) -> None:
    import transformers

    sections: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    if architecture == "MistralForCausalLM":
        sections["sliding_window"] = None  # it would write one of 4,096
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(architectures=[architecture], **sections)
    config.save_pretrained(tmp_path)
    check_same(tmp_path, read_shape(tmp_path))
    wrote(tmp_path, json.dumps(config.to_dict()))  # every key, not only those that differ
    check_same(tmp_path, read_shape(tmp_path))


def test_a_window_that_covers_every_position_is_none(tmp_path: Path) -> None:
    for family in (MISTRAL, PHI3):
        whole = shape_of(tmp_path, **family, max_position_embeddings=4096, sliding_window=None)
        for window in (4096, 4097, 1 << 20):
            assert shape_of(tmp_path, **family, max_position_embeddings=4096, sliding_window=window) == whole
    assert shape_of(tmp_path, **MISTRAL, max_position_embeddings=4096).max_positions == 4096


def test_yarn_stretches_the_model_whatever_max_position_embeddings_says(tmp_path: Path) -> None:
    for positions in (32768, 40960, 131072):
        assert shape_of(tmp_path, max_position_embeddings=positions, rope_scaling=YARN).max_positions == 131072
    llama3 = {"rope_scaling": LLAMA3, "max_position_embeddings": 131072}
    assert shape_of(tmp_path, **llama3).max_positions == 131072
    assert shape_of(tmp_path, max_position_embeddings=4096, rope_scaling={"type": "yarn", "factor": 2.5}).max_positions == 10240


# ---- refused, naming the key

MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
PHI3: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
LONGROPE = {"long_factor": [1.0], "short_factor": [1.0]}
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({**MISTRAL, "sliding_window": 4096, "max_position_embeddings": 32768}, "its sliding_window is 4096: fewer than the 32,768 positions"),
    ({**MISTRAL, "max_position_embeddings": 32768}, "transformers takes 4096 where it is left out, fewer than the 32,768 positions"),
    ({**MISTRAL, "sliding_window": 32768, "max_position_embeddings": 32768, "rope_scaling": YARN}, "fewer than the 131,072 positions"),
    ({**MISTRAL, "sliding_window": 0}, "its sliding_window is 0: must be a whole number"),
    ({**MISTRAL, "sliding_window": True}, "its sliding_window is True: must be a whole number"),
    ({**MISTRAL, "sliding_window": None, "llama_4_scaling": {"beta": 0.1}}, "its llama_4_scaling is {'beta': 0.1}: megafork does not know"),
    ({**PHI3, "sliding_window": 2047, "max_position_embeddings": 4096}, "its sliding_window is 2047: fewer than the 4,096 positions"),
    ({**PHI3, "sliding_window": 2047}, "its sliding_window is 2047: fewer than the 4,096 positions"),
    ({**PHI3, "rope_scaling": {"type": "longrope", **LONGROPE}}, "its rope_scaling.type is 'longrope': must be one of default"),
    ({**PHI3, "rope_scaling": {"type": "su", **LONGROPE}}, "its rope_scaling.type is 'su': must be one of default"),
    ({**PHI3, "rope_scaling": YARN}, "its rope_scaling.rope_type is 'yarn': must be one of default"),  # transformers: longrope
    ({**PHI3, "partial_rotary_factor": 0.75}, "its partial_rotary_factor is 0.75: megafork rotates whole heads"),
    ({**PHI3, "rope_parameters": {"partial_rotary_factor": 0.75}}, "its rope_parameters.partial_rotary_factor is 0.75"),
    ({**PHI3, "partial_rotary_factor": None}, "its partial_rotary_factor is None"),  # which transformers cannot read
    ({**PHI3, "original_max_position_embeddings": None}, "its original_max_position_embeddings is None: must be a whole number"),
    ({**PHI3, "head_dim": None}, "its head_dim is None: must be a whole number"),
    ({**MISTRAL, "sliding_window": None, "num_key_value_heads": None}, "its num_key_value_heads is None: must be a whole number"),
    ({**PHI3, "resid_pdrop": 0.1}, "its resid_pdrop is 0.1: megafork trains models with 0"),
    ({**PHI3, "embd_pdrop": 0.1}, "its embd_pdrop is 0.1: megafork trains models with 0"),
    ({**PHI3, "attention_bias": True}, "its attention_bias is True"),
    ({"resid_pdrop": 0.0}, "its resid_pdrop is 0.0: megafork does not know what it changes"),  # of a Qwen3
    ({"quantization_config": {"quant_method": "fp8"}}, "it is quantised (quantization_config)"),
    ({"quantization_config": {}}, "it is quantised (quantization_config)"),
    ({"compression_config": {"format": "pack"}}, "its compression_config is {'format': 'pack'}: megafork does not know what it changes"),
    ({"partial_rotary_factor": 0.5}, "its partial_rotary_factor is 0.5: megafork rotates whole heads"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "its rope_parameters.partial_rotary_factor is 0.25"),
    ({"rotary_pct": 0.5}, "its rotary_pct is 0.5"),
    ({"attention_bias": True}, "its attention_bias is True: megafork trains models with False"),
    ({"mlp_bias": True}, "its mlp_bias is True"),
    ({"attention_dropout": 0.1}, "its attention_dropout is 0.1"),
    ({"hidden_act": "gelu"}, "its hidden_act is 'gelu': megafork trains models with 'silu'"),
    ({"is_causal": False}, "its is_causal is False"),
    ({"use_sliding_window": True, "sliding_window": 4096}, "its use_sliding_window is True"),
    ({"use_sliding_window": 0}, "its use_sliding_window is 0"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, "its layer_types is ['sliding_attention', 'full_attention']"),
    ({"layer_types": ["full_attention"]}, "in each of the 2 layers"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "sliding_window": 64}, "its sliding_window is 64"),
    ({"architectures": ["LlamaForCausalLM"]}, "its model_type is 'qwen3': that of a LlamaForCausalLM is 'llama'"),
    ({"model_type": None}, "its model_type is None"),
    ({"architectures": ["MixtralForCausalLM"]}, "a MixtralForCausalLM: megafork trains Qwen3ForCausalLM"),
    ({"num_experts": 4}, "its num_experts is 4: megafork does not know what it changes"),  # of a dense Qwen3
    ({**MOE, "num_experts": 0}, "its num_experts is 0: must be a whole number between 1 and 65,536"),
    ({**MOE, "num_experts": 8, "num_local_experts": 4}, "its num_experts is 8: its num_local_experts is 4; delete the wrong one"),
    ({**MOE, "num_experts": 4, "num_experts_per_tok": 5}, "its num_experts_per_tok is 5: the model has 4 experts; give at most as many"),
    ({**MOE, "num_experts": 4}, "its num_experts_per_tok is None: the model has 4 experts"),  # of which transformers would take 8
    ({**MOE, "num_experts_per_tok": 1, "norm_topk_prob": True}, "its num_experts_per_tok is 1: with norm_topk_prob the weight"),
    ({**MOE, "num_experts_per_tok": None}, "its num_experts_per_tok is None: must be a whole number"),
    ({**MOE, "norm_topk_prob": 1}, "its norm_topk_prob is 1: must be true or false"),
    ({**MOE, "moe_intermediate_size": 0}, "its moe_intermediate_size is 0: must be a whole number"),
    ({**MOE, "decoder_sparse_step": 0}, "its decoder_sparse_step is 0: must be a whole number"),
    ({**MOE, "decoder_sparse_step": 3}, "its decoder_sparse_step is 3: with mlp_only_layers it leaves no layer with experts"),
    ({**MOE, "mlp_only_layers": [0, 1]}, "with mlp_only_layers it leaves no layer with experts"),
    ({**MOE, "mlp_only_layers": [2]}, "its mlp_only_layers is [2]: must be a list of layers of the model, from 0 to 1"),
    ({**MOE, "mlp_only_layers": [True]}, "its mlp_only_layers is [True]: must be a list of layers"),
    ({**MOE, "mlp_only_layers": 1}, "its mlp_only_layers is 1: must be a list of layers"),
    ({**MOE, "router_aux_loss_coef": "0.1"}, "its router_aux_loss_coef is '0.1': transformers reads only"),
    ({**MOE, "output_router_logits": None}, "its output_router_logits is None: must be true or false"),
    ({**MOE, "shared_expert_intermediate_size": 64}, "its shared_expert_intermediate_size is 64: megafork does not know"),  # vLLM reads it
    ({**MOE, "n_group": 2}, "its n_group is 2: megafork does not know what it changes"),
    ({"architectures": []}, "a model with architectures []"),
    ({"architectures": "Qwen3ForCausalLM"}, "a model with architectures 'Qwen3ForCausalLM'"),
    ({"architectures": {"a": 1}}, "a model with architectures {'a': 1}"),
    ({"architectures": ["Qwen3ForCausalLM", "LlamaForCausalLM"]}, "a model with architectures ['Qwen3ForCausalLM', 'LlamaForCausalLM']"),
    ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "its dual_chunk_attention_config is"),
    ({"per_layer_config": {"0": {"hidden_size": 3}}}, "its per_layer_config is"),
    ({"transformers_weights": "other.safetensors"}, "its transformers_weights is 'other.safetensors'"),
    ({"model_max_length": 64}, "its model_max_length is 64"),
    ({"\ud800\n": 1}, "its '\\ud800\\n' is 1"),
    ({"logit_scale": "x" * 10_000}, "xxx...: megafork does not know"),
    ({"num_hidden_layers": 10**9}, "its num_hidden_layers is 1000000000: must be a whole number between 1 and 4,096"),
    ({"num_hidden_layers": 0}, "its num_hidden_layers is 0"),
    ({"hidden_size": -64}, "its hidden_size is -64"),
    ({"hidden_size": 64.0}, "its hidden_size is 64.0: must be a whole number"),
    ({"hidden_size": None}, "its hidden_size is None: must be a whole number"),
    ({"vocab_size": "99"}, "its vocab_size is '99': must be a whole number"),
    ({"vocab_size": True}, "its vocab_size is True"),
    ({"num_key_value_heads": 3}, "its num_key_value_heads is 3: the model has 32 attention heads"),
    ({"num_attention_heads": 4}, "the model has 4 attention heads; transformers takes 32 where it is left out"),
    ({"head_dim": 31}, "a head has 31 dimensions"),
    ({"rms_norm_eps": 0}, "its rms_norm_eps is 0: must be a number above 0 and below 1"),
    ({"rms_norm_eps": "1e-6"}, "its rms_norm_eps is '1e-6'"),
    ({"tie_word_embeddings": None}, "its tie_word_embeddings is None: must be true or false"),
    ({"max_position_embeddings": 10**12}, "its max_position_embeddings is 1000000000000"),
    ({"rope_theta": -1.0}, "its rope_theta is -1.0: must be a number above 1"),
    ({"rope_theta": 0}, "its rope_theta is 0"),
    ({"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}}, "its rope_parameters.rope_theta is -1.0"),
    ({"rope_theta": None}, "its rope_theta is None"),
    ({"rope_scaling": "yarn"}, "its rope_scaling is 'yarn': must be an object"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "its rope_scaling.type is 'linear': must be one of default, llama3, yarn"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "its rope_scaling.rope_type is 'dynamic'"),
    (
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        "rope_parameters.rope_type is 'longrope'",
    ),
    ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 2]}}, "its rope_scaling.rope_type is 'mrope'"),
    ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "its rope_scaling.mrope_section is [1, 2]"),
    ({"rope_scaling": {"type": "yarn", "rope_type": "llama3"}}, "its rope_scaling.type is 'yarn': its rope_type is 'llama3'"),
    ({"rope_scaling": {"rope_type": None, "factor": 4.0}}, "its rope_scaling.rope_type is None"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "its rope_scaling.rope_type is ['yarn']"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "lacks 'rope_scaling.factor'"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "its rope_scaling.factor is 0.5: must be at least 1"),
    ({"rope_scaling": {**YARN, "factor": 1e6}}, "its rope_scaling.factor is 1000000.0: must be at least 1, and leave no more than"),
    ({"rope_scaling": {**YARN, "attn_factor": 0.87}}, "its rope_scaling.attn_factor is 0.87: neither transformers nor vLLM reads it"),
    ({"rope_scaling": {**YARN, "beta_fast": None}}, "its rope_scaling.beta_fast is None"),
    ({"rope_scaling": {**YARN, "truncate": "no"}}, "its rope_scaling.truncate is 'no': must be true or false"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "its rope_scaling.high_freq_factor is 1.0: must be a number above 1"),
    ({"rope_scaling": {**LLAMA3, "beta_fast": 32}}, "its rope_scaling.beta_fast is 32"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'rope_scaling.low_freq_factor'"),
    (
        {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}},
        "its rope_parameters.rope_theta is 1000000.0: rope_scaling replaces it by 10000",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=[",".join(map(str, changes))[:40] for changes, _ in CHANGES])
def test_what_would_be_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path / "m", **changes)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_left_out(key: str, tmp_path: Path) -> None:
    wrote(tmp_path, json.dumps({name: value for name, value in BASE.items() if name != key}))
    with pytest.raises(RecipeError, match=f"its config.json lacks '{key}'"):
        read_shape(tmp_path)


def test_null_of_a_key_that_nobody_knows_changes_nothing(tmp_path: Path) -> None:
    assert shape_of(tmp_path, quantization_config=None, something_new=None) == shape_of(tmp_path)


FILES: dict[str, tuple[bytes, str]] = {
    "twice": (b'{"hidden_size": 64, "hidden_size": 128}', "is not valid JSON ('hidden_size' is given twice)"),
    "twice within": (b'{"rope_scaling": {"factor": 1, "factor": 2}}', "'factor' is given twice"),
    "NaN": (b'{"rms_norm_eps": NaN}', "is not valid JSON (NaN is not a number of JSON)"),
    "infinity": (b'{"rms_norm_eps": -Infinity}', "-Infinity is not a number of JSON"),
    "a BOM": (b'\xef\xbb\xbf{"hidden_size": 64}', "is not valid JSON (Unexpected UTF-8 BOM"),
    "not UTF-8": (b'{"hidden_size": "\xff"}', "is not valid JSON ('utf-8' codec can't decode byte 0xff"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON (objects within objects without end)"),
    "a number of 10,000 digits": (b'{"hidden_size": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "cut": (b'{"hidden_size": 64', "is not valid JSON"),
    "text": (b'"model"', "holds a str, not a Hugging Face config"),
    "null": (b"null", "holds a NoneType"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_exactly_json(name: str, tmp_path: Path) -> None:
    text, message = FILES[name]
    with pytest.raises(RecipeError) as caught:
        read_shape(wrote(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_beyond_every_float(tmp_path: Path) -> None:
    wrote(tmp_path, json.dumps(BASE)[:-1] + ', "rope_theta": 1e999}')
    with pytest.raises(RecipeError, match="its rope_theta is inf: must be a number"):
        read_shape(tmp_path)


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    for name, make in (("folder", lambda path: path.mkdir()), ("fifo", os.mkfifo), ("loop", lambda path: path.symlink_to(path))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "config.json")
        with pytest.raises(RecipeError, match=r"its config.json is not a file"):
            read_shape(tmp_path / name)


def test_a_lora_folder_is_told_to_be_merged(tmp_path: Path) -> None:
    for folder in (tmp_path / "adapter", wrote(tmp_path / "beside a model", json.dumps(BASE))):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with pytest.raises(RecipeError, match=r"a LoRA adapter \(adapter_config.json\): merge it into its base model first"):
            read_shape(folder)


def test_a_quantisation_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert "it is quantised (hf_quant_config.json)" in refusal(tmp_path)


def test_dtypes(tmp_path: Path) -> None:
    for changes, dtype in (
        ({}, None),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
    ):
        shape_of(tmp_path, **changes)
        assert read_dtype(tmp_path) == dtype
    wrote(tmp_path, json.dumps({**BASE, "dtype": "float8_e4m3fn"}))
    with pytest.raises(RecipeError, match="its dtype is 'float8_e4m3fn': must be one of float32, bfloat16, float16"):
        read_dtype(tmp_path)


def test_reading_a_shape_imports_nothing_heavy(tmp_path: Path) -> None:
    wrote(tmp_path, json.dumps(BASE))
    program = (
        "import sys; from pathlib import Path; from megafork.shape import read_shape; read_shape(Path(sys.argv[1])); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "megatron", "vllm"} & set(done.stdout.split())


def test_a_layout_that_would_split_a_row_is_refused() -> None:
    shape = Shape("Qwen3ForCausalLM", 2, 48, 60, 12, 1, 4, 99, True, 1e-6, 1e4, None, 512)
    check_layout(shape, Parallel(tp=2))
    with pytest.raises(RecipeError, match=r"parallel\.tp is 3 but the model's queries, keys and values have 56 rows"):
        check_layout(shape, Parallel(tp=3))
