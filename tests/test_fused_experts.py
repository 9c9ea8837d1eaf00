"""Fused layers with experts: in their structure the same model as plain ones, which route, weigh and learn alike.

Their kernels need a GPU (`tools/gpu`). Transformer Engine's modules can be built on the CPU, where it is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import te_kernels
import torch
import training
from fused import KINDS, check_same_model, layer_names, load, model_of, needs_te, save, train_fused
from ranks import on_ranks
from reference import reference
from tiny import MODELS, save_model

from megafork.recipe import Recipe
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tp": 2, "sp": True}),
    "EP2": (2, {"ep": 2}),
    "EP2 TP2": (2, {"ep": 2, "tp": 2, "sp": True}),
    "EP2 ETP2": (4, {"ep": 2, "etp": 2, "tp": 2, "sp": True}),
    "PP2": (2, {"pp": 2}),
    "EP2 PP2": (4, {"ep": 2, "pp": 2}),
}
ATTENTION = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
}
DENSE = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
EXPERTS = {f"mlp.experts.linear_fc{n}.weight{expert}" for n in (1, 2) for expert in range(4)}
SPARSE = {"pre_mlp_layernorm.weight", "mlp.router.weight", *EXPERTS}


def saved_model(folder: Path, model: str, **changes: Any) -> Path:
    architecture, own = MODELS[model]
    return save_model(folder, architecture, dtype=torch.bfloat16, **{**own, **changes})


# ---- structure


@needs_te
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_plain_model_in_names_shapes_marks_and_files(layout: str, tmp_path: Path) -> None:
    world, parallel = LAYOUTS[layout]
    on_ranks(world, check_same_model, saved_model(tmp_path, "MoE", num_hidden_layers=2), parallel)


@needs_te
def test_layers_with_and_without_experts_stand_side_by_side(tmp_path: Path) -> None:
    folder = saved_model(tmp_path, "MoE, some layers dense")
    on_ranks(2, check_same_model, folder, {"ep": 2})
    [names] = on_ranks(1, layer_names, folder)
    assert names == [ATTENTION | (SPARSE if layer == 1 else DENSE) for layer in range(4)]


# ---- checkpoints


def _there_and_back(model: Path, folder: Path) -> None:
    for saved_by in KINDS:
        save(saved_by, model, {"ep": 2, "tp": 2, "sp": True}, folder / saved_by)
        for loaded_by in KINDS:
            assert load(loaded_by, model, {"pp": 2} if loaded_by == "plain" else {"ep": 2}, folder / saved_by) == saved_by


@needs_te
def test_a_checkpoint_of_one_kind_loads_in_every_other(tmp_path: Path) -> None:
    """Strictly, weights and optimizer, under other layouts, in bf16 and FP8."""
    on_ranks(2, _there_and_back, saved_model(tmp_path / "m", "MoE", num_hidden_layers=2), tmp_path)


# ---- experts in FP8


def _rows_of_products(folder: Path) -> tuple[list[int], list[int], list[float]]:
    """Rows of the products of a layer's experts in bf16 and in FP8; how far what both make, and its gradients, is from plain layers'."""
    te_kernels.play()
    generator, found, rows = torch.Generator().manual_seed(1), {}, {}
    hidden = torch.randn(37, 1, 64, generator=generator).bfloat16()
    for kind in KINDS:
        [chunk], shape, mesh, _ = model_of(kind, folder, {})
        load_policy([chunk], HuggingFaceWeights(folder), shape, mesh)
        mlp, given = chunk.decoder.layers[0].mlp, hidden.clone().requires_grad_()
        if kind != "plain":
            mlp.experts.linear_fc1.register_forward_pre_hook(lambda _, inputs, kind=kind: rows.update({kind: inputs[1]}))
        out = mlp(given)[0]
        out.float().square().sum().backward()
        found[kind] = [out.detach(), given.grad, mlp.router.weight.grad]
    distances = [
        float((a.float() - b.float()).norm() / b.float().norm())
        for kind in ("fused", "fp8")
        for a, b in zip(found[kind], found["plain"], strict=True)
    ]
    return rows["fused"], rows["fp8"], distances


@needs_te
def test_an_expert_s_tokens_are_padded_to_what_fp8_needs(tmp_path: Path) -> None:
    [(rows, padded, distances)] = on_ranks(1, _rows_of_products, saved_model(tmp_path, "MoE", num_hidden_layers=1))
    assert sum(rows) == 37 * 2 and padded == [-(-count // 16) * 16 for count in rows] != rows
    assert max(distances) < 0.02


# ---- tokens by expert


@needs_te
@pytest.mark.slow
def test_tokens_are_sorted_as_in_plain_layers_and_added_up_in_fp32() -> None:
    script = Path(__file__).parent / "te_sorting.py"
    done = subprocess.run([sys.executable, script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- three steps


TRAINED: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "EP2 recompute all": (2, {"parallel": {"ep": 2}, "model": {"recompute": "full"}}),
    "EP2 ETP2 TP2": (4, {"parallel": {"ep": 2, "etp": 2, "tp": 2, "sp": True}}),
    "TP2 PP2": (4, {"parallel": {"tp": 2, "sp": True, "pp": 2}}),
    "EP2 replay": (2, {"parallel": {"ep": 2}, "rollout": {"routing": "replay"}, "loss": {}}),
}


def _steps_of(folder: Path, sections: dict[str, Any]) -> list[Recipe]:
    """The balancing loss is on, unless `loss` is among the sections."""
    return training.specs(folder, {"loss": {"expert_balance": 0.3}, **sections})[:1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, own = MODELS["MoE"]
    return save_model(tmp_path_factory.mktemp("model"), architecture, **own, num_hidden_layers=2)


@needs_te
@pytest.mark.slow
@pytest.mark.parametrize("layout", TRAINED)
def test_three_steps_equal_the_float64_reference(layout: str, tiny: Path) -> None:
    """And plain layers, in the statistics of routers too."""
    world, sections = TRAINED[layout]
    spec = _steps_of(tiny, sections)
    plain = on_ranks(1, training.train_on_rank, _steps_of(tiny, {**sections, "parallel": {}}), te_kernels.play)[0]
    training.compare(on_ranks(world, training.train_on_rank, spec, train_fused), [reference(spec[0])], plain)


def _weights_left_out() -> None:
    """What an expert makes of a token is not multiplied by the router's weight."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    right = TEGroupedMLP.forward

    def planted(self: Any, tokens: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor) -> Any:
        return right(self, tokens, counts, torch.ones_like(weights))

    train_fused()
    TEGroupedMLP.forward = planted


def _router_of_megatron() -> None:
    """The router is not ours, and does not balance."""
    from megafork.model import experts

    train_fused()
    experts.Router.routing = experts.TopKRouter.routing  # type: ignore[method-assign]


def _experts_shared_by_all() -> None:
    """The gradients of experts are summed over ranks that hold others."""
    train_fused()
    build = training.build_policy

    def planted(*args: Any) -> Any:
        chunks = build(*args)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.allreduce = True
        return chunks

    training.build_policy = planted  # type: ignore[assignment]


@needs_te
@pytest.mark.slow
@pytest.mark.parametrize("plant", [_weights_left_out, _router_of_megatron, _experts_shared_by_all])
def test_a_planted_bug_is_found(plant: Callable[[], None], tiny: Path) -> None:
    spec = _steps_of(tiny, {"parallel": {"ep": 2}})
    results = on_ranks(2, training.train_on_rank, spec, plant, 1)
    wanted = [reference(spec[0], steps=1)]
    with pytest.raises(AssertionError):
        training.compare(results, wanted)
