"""Fused layers with experts: in their structure the same model as plain ones, which route, weigh and learn alike.

Their kernels need a GPU (`tools/gpu`). Transformer Engine's modules can be built on the CPU, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused import KINDS, check_same_model, layer_names, load, needs_te, save
from ranks import on_ranks
from tiny import MODELS, save_model

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
            for layout in ({"pp": 2}, {"tp": 2, "sp": True}, {"ep": 2}):
                assert load(loaded_by, model, layout, folder / saved_by) == saved_by


@needs_te
def test_a_checkpoint_of_one_kind_loads_in_every_other(tmp_path: Path) -> None:
    """Strictly, weights and optimizer, under other layouts, in bf16 and FP8."""
    on_ranks(2, _there_and_back, saved_model(tmp_path / "m", "MoE", num_hidden_layers=2), tmp_path)
