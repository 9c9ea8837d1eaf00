"""FP8 folders: the numbers in a block, the format that vLLM loads, and vLLM's results with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fp8 import EXPERTS, WIDE, reference, score
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_model

from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.convert.sources import open_source
from megafork.convert.verify import VerifyError, compare_blocks
from megafork.model.fp8 import BLOCK, check_blocks, dequantize, is_quantized, quantize
from megafork.recipe import RecipeError
from megafork.shape import read_shape


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    size=st.floats(-30, 30),
    spread=st.floats(0, 8),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(rows=256, columns=128, size=0.0, spread=0.0, seed=1, dtype=torch.bfloat16)
@example(rows=2100, columns=3, size=0.0, spread=1.0, seed=1, dtype=torch.float32)  # more rows than are quantised at once
def test_a_block_keeps_its_largest_number_and_the_rest_to_a_sixteenth(
    rows: int, columns: int, size: float, spread: float, seed: int, dtype: torch.dtype
) -> None:
    draw = np.random.default_rng(seed)
    drawn = draw.standard_normal((rows, columns)) * np.exp2(size + spread * draw.standard_normal((rows, columns)))
    weight = torch.from_numpy(drawn).to(dtype)
    weight[: rows // 3, : columns // 3] = 0
    small, scale = quantize(weight)
    assert small.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and small.shape == weight.shape
    assert scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK)) and bool((scale > 0).all())
    back, exact = dequantize(small, scale).double(), weight.double()
    for i in range(scale.size(0)):
        for j in range(scale.size(1)):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            largest, unit = float(exact[block].abs().max()), float(scale[i, j])
            assert float(small[block].float().abs().max()) == (448.0 if largest else 0.0), "the whole range of e4m3 is used"
            assert abs(float(back[block].abs().max()) - largest) <= 1e-6 * largest
            allowed = torch.maximum(exact[block].abs() / 16, torch.tensor(unit * 2.0**-10)) * (1 + 1e-5)  # half a unit in the last place
            assert bool(((back[block] - exact[block]).abs() <= allowed).all())


def fp8_folder(tmp_path: Path, architecture: str = "Qwen3", **changes: Any) -> tuple[Path, Path]:
    source = save_model(tmp_path / "in", architecture, dtype=torch.bfloat16, **{**WIDE, **changes})
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", fp8=True, verify=True)
    return source, tmp_path / "fp8"


SOME_DENSE: dict[str, Any] = {**EXPERTS, "num_experts": 3, "mlp_only_layers": [0, 2]}


@pytest.mark.parametrize(
    ("architecture", "sizes", "projections_of", "kept"),
    [
        ("Qwen3", {"tie_word_embeddings": True}, [7, 7, 7, 7], []),
        ("Qwen3", {"tie_word_embeddings": False}, [7, 7, 7, 7], []),
        ("Phi3", {"tie_word_embeddings": False}, [4, 4, 4, 4], []),
        ("Qwen3Moe", SOME_DENSE, [7, 4 + 3 * 3, 7, 4 + 3 * 3], ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate"]),
    ],
    ids=["tied", "untied", "fused", "mixture"],
)
def test_the_folder_has_deepseeks_form(
    architecture: str, sizes: dict[str, Any], projections_of: list[int], kept: list[str], tmp_path: Path
) -> None:
    source, folder = fp8_folder(tmp_path, architecture, **sizes)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *kept],
    }
    assert config == json.loads((source / "config.json").read_text())
    projections = {name for name in before if "_proj" in name}
    assert [len([name for name in projections if f".layers.{layer}." in name]) for layer in range(4)] == projections_of
    assert all(is_quantized(name, read_shape(source)) for name in projections)
    assert after.keys() == before.keys() | {name + "_scale_inv" for name in projections}
    for name, tensor in before.items():
        if name in projections:
            scale, exact = after[name + "_scale_inv"].double().numpy(), tensor.double().numpy()
            rows, columns = exact.shape
            assert after[name].dtype == torch.float8_e4m3fn and scale.shape == (-(-rows // 128), -(-columns // 128))
            unit = np.kron(scale, np.ones((128, 128)))[:rows, :columns]
            found = after[name].double().numpy() * unit
            assert np.all(np.abs(found - exact) <= np.maximum(np.abs(exact) / 16, unit * 2.0**-10) * (1 + 1e-5)), name
        else:
            assert torch.equal(after[name], tensor), f"{name} is left alone"
    megatron_to_hf(source, tmp_path / "direct", fp8=True)
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert all(torch.equal(direct[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in after.items())


def test_what_engines_of_a_mixture_could_not_load_is_refused(tmp_path: Path) -> None:
    """Blocks of an expert that is split, unlike those of one that is whole, must lie within a rank's part; an MLP that no layer has need
    not fit."""
    shape = read_shape(save_model(tmp_path, "Qwen3Moe", **{**EXPERTS, "num_attention_heads": 4, "num_key_value_heads": 4}))
    shape = replace(shape, ffn=320)
    check_blocks(shape, 2, "f")
    with pytest.raises(
        RecipeError, match=r"^f: an expert's gate_proj has 64 rows a rank, .*; set rollout\.whole_experts=true, or do without"
    ):
        check_blocks(shape, 4, "f")
    check_blocks(shape, 4, "f", whole_experts=True)
    odd = replace(shape, moe=replace(shape.mixture, ffn=192))
    for whole in (False, True):
        with pytest.raises(RecipeError, match=r"^f: an expert's gate_proj has (96|192) rows a rank"):
            check_blocks(odd, 2, "f", whole_experts=whole)


def test_verify_sees_another_scale(tmp_path: Path) -> None:
    source, folder = fp8_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"][0, 0] *= 1.2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VerifyError, match=r"^--verify: model\.layers\.1\.mlp\.down_proj\.weight: differ from the source's"):
        compare_blocks(open_source(source, keep=True), folder, lambda done: None)


@pytest.mark.parametrize(
    ("architecture", "sizes", "dtype", "message"),
    [
        ("Qwen3", {"num_key_value_heads": 3, "num_attention_heads": 6, "head_dim": 64}, torch.bfloat16, r"k_proj has 192 rows a rank"),
        ("Qwen3", {"intermediate_size": 320}, torch.bfloat16, r"gate_proj has 320 rows a rank"),
        ("Qwen3", {}, torch.float32, r"add --dtype bf16"),
        ("Phi3", {"num_key_value_heads": 3, "num_attention_heads": 6, "head_dim": 64}, torch.bfloat16, r"qkv_proj has 192 rows of keys"),
        ("Phi3", {"intermediate_size": 320}, torch.bfloat16, r"gate_up_proj has 320 rows of gate a rank"),
        ("Qwen3Moe", {"moe_intermediate_size": 192}, torch.bfloat16, r"an expert's gate_proj has 192 rows a rank"),
        ("Qwen3Moe", {"moe_intermediate_size": 128, "hidden_size": 192}, torch.bfloat16, r"hidden_size is 192, no multiple of 128"),
        ("Qwen3Moe", {**SOME_DENSE, "intermediate_size": 320}, torch.bfloat16, r"gate_proj has 320 rows a rank"),
    ],
)
def test_what_vllm_could_not_load_is_refused(
    architecture: str, sizes: dict[str, int], dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "in", architecture, dtype=dtype, **{**WIDE, **sizes})
    with pytest.raises(RecipeError, match=rf"^--fp8: .*{message}"):
        megatron_to_hf(source, tmp_path / "out", fp8=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "sizes"), [("Qwen3", {}), ("Phi3", {}), ("Qwen3Moe", EXPERTS)])
def test_vllm_computes_with_it(architecture: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    source, folder = fp8_folder(
        tmp_path, architecture, **{**sizes, "num_hidden_layers": 1}
    )  # in more, rounding of rounding hides what is compared
    found = torch.tensor(score(folder, "with"))
    from_fp8, from_bf16 = ((found - torch.stack(reference(source, fp8=fp8))).abs().mean() for fp8 in (True, False))
    assert from_fp8 < 0.1 and from_bf16 > 1.7 * from_fp8, "vLLM computes what the blocks say, as far as bf16 before the rounding goes"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() or torch.cpu._is_amx_tile_supported(), reason="vLLM has a block kernel for this machine")
@pytest.mark.parametrize(
    ("architecture", "sizes", "kernels", "said"),
    [("Qwen3", {}, "without", "Failed to find a kernel"), ("Qwen3Moe", EXPERTS, "linears", "Unsupported FP8 MoE backend: NONE")],
)
def test_vllm_still_has_no_kernel_of_its_own(architecture: str, sizes: dict[str, Any], kernels: str, said: str, tmp_path: Path) -> None:
    """When this fails, see whether megafork/compat/vllm_fp8.py can go."""
    assert said in score(fp8_folder(tmp_path, architecture, **sizes)[1], kernels)
