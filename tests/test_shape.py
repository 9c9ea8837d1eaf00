"""config.json: megafork reads it as transformers does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from config_json import BASE, MISTRAL, MOE, PHI3, TYPES, shape_of, wrote
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import LLAMA3, MODELS, YARN

from megafork.model.rope import inverse_frequencies, softmax_scale
from megafork.recipe import RecipeError
from megafork.shape import Shape, Yarn, read_dtype, read_shape

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
