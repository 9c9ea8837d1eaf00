"""Quantisation by nvidia-modelopt if it is installed, and the message if it is not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import edit_json
from fp8 import EXPERTS, PROMPTS, WIDE, reference, score
from ranks import on_ranks
from safetensors.torch import load_file
from tiny import save_model

from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.convert.quantize import CONFIGS, quantize_folder
from megafork.convert.verify import VerifyError
from megafork.recipe import RecipeError

HERE = importlib.util.find_spec("modelopt") is not None


def needs_modelopt(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.skipif(not HERE, reason="nvidia-modelopt is not installed (megafork[quantize])")(test))


def _convert(folder: Path) -> None:
    hf_to_megatron(folder / "in", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "out", quantize="fp8_per_channel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, r"^--quantize is 'int3': choose one of fp8_per_channel, "),
        ({"quantize": "fp8_blocks", "fp8": True}, r"^--quantize is 'fp8_blocks' and --fp8 is set"),
        ({"quantize": "fp8_blocks", "verify": True}, r"^--quantize is 'fp8_blocks' and --verify is set"),
        pytest.param(
            {"quantize": "fp8_blocks"},
            r"^--quantize is 'fp8_blocks': vLLM loads no experts with modelopt's scales, one for each block; choose --fp8, which",
            marks=pytest.mark.skipif(not HERE, reason="nvidia-modelopt is not installed"),
        ),
        pytest.param(
            {"quantize": "fp8_blocks"},
            r"nvidia-modelopt is not installed: pip install 'megafork\[quantize\]'",
            marks=pytest.mark.skipif(HERE, reason="nvidia-modelopt is installed"),
        ),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    save_model(tmp_path / "in", "Qwen3Moe", dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match=message):
        megatron_to_hf(tmp_path / "in", tmp_path / "out", **options)  # type: ignore[arg-type]


@needs_modelopt
def test_vllm_loads_what_modelopt_writes(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", dtype=torch.bfloat16, num_hidden_layers=1, **WIDE)
    (source / "tokenizer.json").write_text("{}")
    on_ranks(1, _convert, tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "plain").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    difference = (torch.tensor(score(tmp_path / "out", "with")) - torch.stack(reference(source, fp8=False))).abs().mean()
    assert 0.02 < difference < 0.3, f"quantised, and the model still: {len(PROMPTS)} prompts differ by {difference}"


@needs_modelopt
def test_settings_of_generation_that_transformers_would_not_write(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", dtype=torch.bfloat16, num_hidden_layers=1, **WIDE)
    edit_json(source / "config.json", max_length=20, temperature=0.6)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    on_ranks(1, _convert, tmp_path)
    assert (tmp_path / "out/generation_config.json").read_text() == '{"temperature": 0.6, "do_sample": false}'


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture `in`, whose first layer is dense, and by name what modelopt makes of it."""
    folder = tmp_path_factory.mktemp("mixture")
    save_model(folder / "in", "Qwen3Moe", dtype=torch.bfloat16, num_hidden_layers=2, mlp_only_layers=[0], **EXPERTS)
    assert on_ranks(1, _quantize, folder) == [True]
    return folder


def _quantize(folder: Path) -> bool:
    for name in CONFIGS:
        shutil.copytree(folder / "in", folder / "copy")
        (folder / name).mkdir()
        quantize_folder(folder / "copy", folder / name, name)
        shutil.rmtree(folder / "copy")
    megatron_to_hf(folder / "in", folder / "converted", quantize="nvfp4_weights")
    CONFIGS["nvfp4_weights"] = "NVFP4_MLP_WEIGHT_ONLY_CFG"
    try:
        megatron_to_hf(folder / "in", folder / "part", quantize="nvfp4_weights")
    except VerifyError as error:
        return "did not quantise model.layers.0.self_attn." in str(error) and not (folder / "part").exists()
    return False


@needs_modelopt
def test_every_projection_of_a_mixture_is_in_4_bits(mixture: Path) -> None:
    """Each weight is the nearest of its group's numbers, the group's scale the nearest e4m3 to what its largest weight needs."""
    before, after = load_file(mixture / "in/model.safetensors"), load_file(mixture / "nvfp4_weights/model.safetensors")
    converted = load_file(mixture / "converted/model.safetensors")
    assert all(torch.equal(converted[name].float(), tensor.float()) for name, tensor in after.items())
    projections = {name for name in before if "_proj" in name}
    assert len(projections) == 7 + 4 + 3 * 4
    assert after.keys() == before.keys() | {name + suffix for name in projections for suffix in ("_scale", "_scale_2")}
    assert json.loads((mixture / "nvfp4_weights/config.json").read_text())["quantization_config"]["ignore"] == [
        *("lm_head", "model.embed_tokens", "model.layers.1.mlp.gate")
    ]
    for name, exact in before.items():
        if name in projections:
            check_4_bits(exact, after[name], after[name + "_scale"], after[name + "_scale_2"])
        else:
            assert torch.equal(after[name], exact), f"{name} is left alone"


def check_4_bits(exact: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> None:
    """`codes`: two to a byte, the first in the lower half; the highest bit is the sign."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    numbers = torch.cat([positive, -positive])
    groups = exact.double().unflatten(-1, (-1, 16))
    units = (scale.double() * scale_2.double())[..., None]
    found = numbers[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()].unflatten(-1, (-1, 16)) * units
    nearest = (groups[..., None] - numbers * units[..., None]).abs().amin(-1)
    assert bool(((found - groups).abs() <= nearest + 1e-6 * units).all())
    needed = groups.abs().amax(-1, keepdim=True) / 6
    assert bool(((units - needed).abs() <= needed / 16 + 2.0**-10 * float(scale_2)).all())


@needs_modelopt
def test_vllm_loads_the_experts_in_4_bits(mixture: Path) -> None:
    """Its kernels are for GPUs only, but where it puts the tensors is seen without one."""
    assert on_ranks(1, _compare_loaded, mixture, engines=True) == [set()], "every parameter is loaded"


def _compare_loaded(folder: Path) -> set[str]:
    """The parameters that vLLM finds no tensors for."""
    before = load_file(folder / "in/model.safetensors")
    missing, loaded = _load(folder / "nvfp4_weights")
    for expert in range(4):
        head = f"model.layers.1.mlp.experts.{expert}"
        first = torch.cat([before[f"{head}.gate_proj.weight"], before[f"{head}.up_proj.weight"]])
        gate_scale, up_scale = loaded["w13_weight_scale_2"][expert]
        assert gate_scale == up_scale, "vLLM takes the gate's for both"
        check_4_bits(first, loaded["w13_weight"][expert], loaded["w13_weight_scale"][expert], gate_scale)
        codes, scale, scale_2 = (loaded[f"w2_weight{part}"][expert] for part in ("", "_scale", "_scale_2"))
        check_4_bits(before[f"{head}.down_proj.weight"], codes, scale, scale_2)
    return missing


def _load(folder: Path) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The parameters that vLLM finds no tensors for, and those of the second layer's experts."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, NvFp4LinearLayerConfig
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    modelopt.select_nvfp4_moe_backend = lambda **_: (NvFp4MoeBackend.MARLIN, MarlinExperts)
    modelopt.init_nvfp4_linear_kernel = lambda **_: EmulationNvFp4LinearKernel(NvFp4LinearLayerConfig())
    config = EngineArgs(str(folder), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "env://", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = initialize_model(config)
        loaded = model.load_weights(get_model_loader(config.load_config).get_all_weights(config.model_config, model))
    parameters = dict(model.named_parameters())
    of_activations = {name for name in parameters if "input_scale" in name or ".self_attn.attn." in name}  # they stay bf16
    experts = {name.rpartition(".")[2]: tensor.data for name, tensor in parameters.items() if "layers.1.mlp.experts" in name}
    return parameters.keys() - loaded - of_activations, experts


@needs_modelopt
@pytest.mark.parametrize("name", ["fp8_per_channel", "fp8_blocks"])
def test_vllm_still_loads_no_experts_with_other_scales(name: str, mixture: Path) -> None:
    """When this fails, vLLM can, and `quantize._NOT_OF_EXPERTS` can go."""
    with pytest.raises(AssertionError, match=r"_load_per_tensor_weight_scale"):
        score(mixture / name, "with")
