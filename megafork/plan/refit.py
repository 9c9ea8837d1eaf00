"""What a refit moves between ranks and nodes: counted from the plan that the bridge follows, without a GPU and without weights."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megafork.plan.hardware import GPUS_A_NODE
from megafork.plan.parameters import WIDTH
from megafork.recipe import Parallel, Recipe, RecipeError
from megafork.shape import Shape, check_engines, check_layout, check_world
from megafork.weights.reshard import Cost, LowerBound, Reshard, cost, cost_of_full_gather, lower_bound

COMPARED = (Parallel(tp=8, pp=4, sp=True), Parallel(tp=4, pp=4, sp=True), Parallel(tp=8, pp=2, cp=2, sp=True), Parallel(tp=8, sp=True))
"""Training layouts that `refits` sets beside the recipe's own, each with engines of `ENGINES` ranks."""
ENGINES = (4, 8)


@dataclass(frozen=True)
class Refit:
    """One refit from a training layout to engines of `rollout_tp` ranks. All counts are elements of `width` bytes."""

    layout: Parallel
    gpus: int
    rollout_tp: int
    width: int
    plan: Cost
    gather: Cost
    """Every rank collects every tensor whole, and keeps what its engine loads."""
    least: LowerBound

    @property
    def name(self) -> str:
        layout = self.layout
        return f"TP{layout.tp} PP{layout.pp} CP{layout.cp} DP{self.gpus // layout.model_size} to TP{self.rollout_tp}"

    def to_dict(self) -> dict[str, Any]:
        """Bytes."""
        ways = {"plan": vars(self.plan), "full_gather": vars(self.gather), "lower_bound": self.least._asdict()}
        counts = {way: {name: count * self.width for name, count in cost.items()} for way, cost in ways.items()}
        return {"layout": self.layout.model_dump(), "gpus": self.gpus, "rollout_tp": self.rollout_tp, **counts}


def count_refit(shape: Shape, layout: Parallel, gpus: int, rollout_tp: int, dtype: str = "bf16") -> Refit:
    """Raises RecipeError for a layout or an engine size that model and GPUs do not allow."""
    check_layout(shape, layout)
    check_world(layout, gpus)
    check_engines(rollout_tp, gpus)
    plan = Reshard(shape, layout, gpus, rollout_tp, GPUS_A_NODE)
    return Refit(layout, gpus, rollout_tp, WIDTH[dtype], cost(plan), cost_of_full_gather(plan), lower_bound(plan))


def refits(shape: Shape, recipe: Recipe, gpus: int) -> list[Refit]:
    """The recipe's own refit first, then those of `COMPARED` that model and GPUs allow."""
    dtype = recipe.precision.dtype
    own = count_refit(shape, recipe.parallel, gpus, recipe.rollout.tp, dtype)
    counted = {own.name: own}
    for layout, engine in itertools.product(COMPARED, ENGINES):
        with suppress(RecipeError):
            refit = count_refit(shape, layout, gpus, engine, dtype)
            counted.setdefault(refit.name, refit)
    return list(counted.values())
