"""config.json: anything that would be a different model is refused in one line that names the key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_json import BASE, MISTRAL, MOE, PHI3, refusal, shape_of, wrote
from public_models import LLAMA3, YARN

from megafork.recipe import Parallel, RecipeError
from megafork.shape import Shape, check_layout, read_dtype, read_shape

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
