"""Other layouts for the same recipe and GPUs: those that fit, fastest estimate first."""

from __future__ import annotations

import itertools
from typing import Any

from megafork.plan.hardware import GPUS_PER_NODE
from megafork.plan.planner import Plan

_SIZES = (1, 2, 4, 8, 16)
_FRACTIONS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_SPARE = 0.05
"""Share of the memory that a proposal leaves free: most of its bytes are estimates."""


def proposals(plan: Plan, show: int = 10) -> list[Plan]:
    """The `show` best plans over tp, pp, vpp, cp, sp, ep and recompute, each with the least recomputation that fits, and then the most
    memory for vLLM.

    TP x CP stays within a node. Sequence parallelism is on whenever tp > 1: it only saves memory. With ep, experts are whole.
    """
    found = []
    experts = _SIZES if plan.shape.moe is not None else (1,)
    for tp, pp, cp, vpp, ep in itertools.product(_SIZES, _SIZES, _SIZES, (1, 2), experts):
        if tp * cp <= GPUS_PER_NODE and plan.gpus % (tp * pp * cp) == 0 and (pp > 1 or vpp == 1):
            sizes = {"tp": tp, "pp": pp, "cp": cp, "vpp": vpp, "sp": tp > 1, "ep": ep, "etp": None}
            sizes |= {"first_stage_layers": None, "last_stage_layers": None}
            found += _best(plan, {f"parallel.{name}": size for name, size in sizes.items()})
    return sorted(found, key=lambda one: one.step.seconds)[:show]


def _best(plan: Plan, layout: dict[str, Any]) -> list[Plan]:
    """The plan, in a list, if one fits."""
    for recompute, fraction in itertools.product(("none", "selective", "full"), _FRACTIONS):
        try:
            one = plan.with_changes({**layout, "model.recompute": recompute, "rollout.gpu_memory_fraction": fraction})
        except ValueError:  # not allowed by model or recipe; includes RecipeError
            return []
        if not one.over and max(one.peaks.values()) <= (1 - _SPARE) * one.gpu.memory:
            return [one]
    return []
