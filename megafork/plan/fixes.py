"""Changes that would make a plan fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from megafork.plan.hardware import GPUS_PER_NODE
from megafork.plan.planner import Plan


def fixes(plan: Plan) -> list[dict[str, Any]]:
    """Changes of one `section.key` that make everything fit, one for each key that can; if no single key can, changes of two keys.

    Empty if two keys do not suffice either.
    """
    knobs = {name: values for name, values in _knobs(plan).items() if values}
    for count in (1, 2):
        chosen = [next(_that_fit(plan, names, knobs), None) for names in itertools.combinations(knobs, count)]
        if any(chosen):
            return [changes for changes in chosen if changes]
    return []


def _that_fit(plan: Plan, names: tuple[str, ...], knobs: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(knobs[name] for name in names)):
        changes = dict(zip(names, values, strict=True))
        try:
            fits = plan.with_changes(changes).fits
        except ValueError:  # not allowed by recipe, model or GPUs; includes RecipeError
            continue
        if fits:
            yield changes


def _knobs(plan: Plan) -> dict[str, list[Any]]:
    """Keys and the values to try for each, those that cost the least speed first."""
    recipe, layout = plan.recipe, plan.recipe.parallel
    recomputes = ["none", "selective", "full"]
    share = recipe.rollout.gpu_memory_fraction
    within = [size for size in (2, 4, 8) if size <= GPUS_PER_NODE]
    return {
        "model.kernels": ["fused"] if plan.layers == "plain" and recipe.precision.dtype == "bf16" else [],
        "parallel.sp": [] if layout.sp else [True],
        "rollout.park_training": [] if recipe.rollout.park_training or recipe.rollout.servers else [True],
        "rollout.gpu_memory_fraction": [other for other in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2) if other != share],
        "model.recompute": recomputes[recomputes.index(recipe.model.recompute) + 1 :],
        "rollout.tp": [size for size in within if size > recipe.rollout.tp],
        "parallel.ep": [size for size in (2, 4, 8, 16) if size > layout.ep] if plan.shape.moe is not None else [],
        "parallel.tp": [size for size in within if size > layout.tp],
        "parallel.cp": [2 * layout.cp, 4 * layout.cp],
        "parallel.pp": [2 * layout.pp, 4 * layout.pp],
    }
