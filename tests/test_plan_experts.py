"""The planner of mixtures of experts against models that were built, and against what their forward and backward allocate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_plan import check_held
from tiny import recipe

from megafork.shape import Mixture, Shape

SHAPE = Shape("Qwen3MoeForCausalLM", 4, 64, 96, 4, 2, 32, 99, False, 1e-6, 1e4, None, 512, Mixture(4, 2, 48, True, (0, 1, 2, 3)))
SOME_DENSE = {"moe": Mixture(4, 2, 48, True, (1, 3))}

# (ranks, recipe sections, changes of the model)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ep1-tp2": (2, {"parallel": {"tp": 2, "sp": True}}, {}),
    "ep2-overlap-bf16": (4, {"parallel": {"ep": 2}, "precision": {"dtype": "bf16"}, "optimizer": {"overlap": True}}, {}),
    "ep2-tp2-sp": (2, {"parallel": {"ep": 2, "tp": 2, "sp": True}}, SOME_DENSE),
    "ep2-etp2": (4, {"parallel": {"ep": 2, "etp": 2}, "precision": {"dtype": "bf16"}}, {}),
    "ep2-pp2-tied": (4, {"parallel": {"ep": 2, "pp": 2}}, {"tied": True, "moe": Mixture(4, 2, 48, True, (2, 3))}),
    "ep2-pp2-vpp2": (4, {"parallel": {"ep": 2, "pp": 2, "vpp": 2}}, SOME_DENSE),
    "ep2-cp2-dp2": (4, {"parallel": {"ep": 2, "cp": 2}}, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_gradients_and_optimizer_are_those_of_a_built_model(name: str) -> None:
    world, sections, changes = LAYOUTS[name]
    check_held(world, recipe(Path("unused"), **sections), replace(SHAPE, **changes))
