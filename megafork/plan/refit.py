"""Data that a refit moves between ranks and nodes, counted from the transfer plan itself, without a GPU or weights."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from megafork.plan.hardware import GPUS_PER_NODE
from megafork.plan.parameters import WIDTH, count_of
from megafork.recipe import Parallel, Recipe, RecipeError
from megafork.shape import Shape, check_engines, check_layout, check_world
from megafork.weights.mapping import Parameter, pieces, shards_of
from megafork.weights.reshard import Reshard, area, meet

COMPARED = (Parallel(tp=8, pp=4, sp=True), Parallel(tp=4, pp=4, sp=True), Parallel(tp=8, pp=2, cp=2, sp=True), Parallel(tp=8, sp=True))
"""Training layouts that `refits` compares with the recipe's own, each with engines of `ENGINES` ranks."""
COMPARED_MIXTURES = (
    Parallel(ep=8),
    Parallel(tp=2, sp=True, ep=8),
    Parallel(tp=4, pp=2, sp=True, ep=8),
    Parallel(tp=2, cp=2, sp=True, ep=8),
)
"""Those for a mixture of experts."""
ENGINES = (4, 8)


@dataclass(frozen=True)
class Cost:
    """Elements moved between ranks in one refit: most received and sent by any rank, and the total between nodes."""

    received: int
    sent: int
    total: int
    between_nodes: int


def cost(plan: Reshard) -> Cost:
    """Cost of the transfer plan."""
    received, sent = [0] * plan.world, [0] * plan.world
    between_nodes = 0
    for parameter, times in _alike(plan):
        for transfer in plan.transfers([parameter]):
            if transfer.source != transfer.target:
                count = transfer.numel * times
                received[transfer.target] += count
                sent[transfer.source] += count
                between_nodes += count if transfer.source // plan.node != transfer.target // plan.node else 0
    return Cost(max(received), max(sent), sum(received), between_nodes)


def cost_of_full_gather(plan: Reshard) -> Cost:
    """Cost of the naive method: every rank gathers every whole tensor from the ranks of its model replica."""
    layout, per_stage = plan.layout, plan.world // plan.layout.pp
    received, sent = [0] * plan.world, [0] * plan.world
    between_nodes = 0
    for (stage, every, replicated), size in _sizes(plan).items():
        for rank, part in itertools.product(range(plan.world), range(every)):
            source = stage * per_stage + rank % per_stage // every * every + part
            if source != rank and (not replicated or part == rank % layout.tp):
                count = size if replicated else size // every
                received[rank] += count
                sent[source] += count
                between_nodes += count if source // plan.node != rank // plan.node else 0
    return Cost(max(received), max(sent), sum(received), between_nodes)


def _sizes(plan: Reshard) -> Counter[tuple[int, int, bool]]:
    """Elements of the parameters of each (stage, number of consecutive ranks that hold them together, whether each of these holds all)."""
    sizes: Counter[tuple[int, int, bool]] = Counter()
    for parameter, times in _alike(plan):
        every = shards_of(parameter, plan.shape, plan.layout).every
        sizes[plan.stage(parameter), every, parameter.rule.kind == "replicated"] += times * count_of(parameter, plan.shape)
    return sizes


def _alike(plan: Reshard) -> Iterator[tuple[Parameter, int]]:
    """One parameter for all that have the same transfers, and how many they are: those of like layers, and of the experts that the same
    ranks hold."""
    for bucket, times in plan.alike:

        def kind(parameter: Parameter) -> tuple[Any, ...]:
            return parameter.rule, shards_of(parameter, plan.shape, plan.layout), plan.owner(parameter)

        groups: dict[tuple[Any, ...], list[Parameter]] = {}
        for parameter in bucket:
            groups.setdefault(kind(parameter), []).append(parameter)
        yield from ((members[0], times * len(members)) for members in groups.values())


class LowerBound(NamedTuple):
    """Elements that any method must move."""

    received: int
    """The most elements that any rank's engine loads and the rank does not hold."""
    between_nodes: int
    """Sum over nodes of the elements that the node's engines load and none of its ranks holds, counted once per node."""


def lower_bound(plan: Reshard) -> LowerBound:
    """The lower bound, derived from what ranks need and hold rather than from the plan's transfers."""
    ranks, nodes = (range(0, plan.world, size) for size in (1, plan.node))
    return LowerBound(
        received=max(_lacking(plan, range(rank, rank + 1)) for rank in ranks),
        between_nodes=sum(_lacking(plan, range(first, min(first + plan.node, plan.world))) for first in nodes),
    )


def _lacking(plan: Reshard, ranks: range) -> int:
    """Elements that the engines on these ranks load and none of the ranks holds. Parts of two engine ranks are either equal or disjoint."""
    shape, per_stage = plan.shape, plan.world // plan.layout.pp
    lacking = 0
    for parameter, times in _alike(plan):
        spread = shards_of(parameter, shape, plan.layout)
        shards = {spread.of(rank % per_stage) for rank in ranks if rank // per_stage == plan.stage(parameter)}
        held = {piece for shard in shards if shard is not None for piece in pieces(parameter, shape, spread.parts, shard)}
        for name in parameter.huggingface():
            for part in {part for rank in ranks for part in plan.needed(name, rank)}:
                there = (meet(*part, piece) for piece in held if piece.name == name)
                lacking += times * (area(*part) - sum(area(*covered) for covered in there if covered))
    return lacking


@dataclass(frozen=True)
class Refit:
    """One refit from a training layout to engines of `rollout_tp` ranks. All counts are elements of `width` bytes."""

    layout: Parallel
    gpus: int
    rollout_tp: int
    width: int
    plan: Cost
    gather: Cost
    """Each rank gathers every tensor whole and keeps the part that its engine loads."""
    least: LowerBound

    @property
    def name(self) -> str:
        layout = self.layout
        experts = f" EP{layout.ep}" + (f" ETP{layout.etp}" if layout.expert_tp > 1 else "") if layout.ep > 1 else ""
        return f"TP{layout.tp} PP{layout.pp} CP{layout.cp}{experts} DP{self.gpus // layout.model_size} to TP{self.rollout_tp}"

    def to_dict(self) -> dict[str, Any]:
        """All counts, in bytes."""
        methods = {"plan": vars(self.plan), "full_gather": vars(self.gather), "lower_bound": self.least._asdict()}
        counts = {method: {name: count * self.width for name, count in cost.items()} for method, cost in methods.items()}
        return {"layout": self.layout.model_dump(), "gpus": self.gpus, "rollout_tp": self.rollout_tp, **counts}


def count_refit(shape: Shape, layout: Parallel, gpus: int, rollout_tp: int, dtype: str = "bf16", *, whole_experts: bool = False) -> Refit:
    """Count one refit. Raises RecipeError if model or GPUs do not allow the layout or the engine size."""
    check_layout(shape, layout)
    check_world(layout, gpus)
    check_engines(rollout_tp, gpus)
    plan = Reshard(shape, layout, gpus, rollout_tp, GPUS_PER_NODE, whole_experts)
    return Refit(layout, gpus, rollout_tp, WIDTH[dtype], cost(plan), cost_of_full_gather(plan), lower_bound(plan))


def planning_s(shape: Shape, recipe: Recipe, gpus: int) -> float:
    """Seconds that a rank takes for its routes, measured here. Layout, GPUs and engines must fit."""
    plan = Reshard(shape, recipe.parallel, gpus, recipe.rollout.tp, GPUS_PER_NODE, recipe.rollout.whole_experts)
    begin = time.perf_counter()
    plan.routes(gpus // 2)
    return time.perf_counter() - begin


def refits(shape: Shape, recipe: Recipe, gpus: int) -> list[Refit]:
    """The recipe's own refit, then those of `COMPARED`, or `COMPARED_MIXTURES`, that model and GPUs allow."""
    dtype = recipe.precision.dtype
    own = count_refit(shape, recipe.parallel, gpus, recipe.rollout.tp, dtype, whole_experts=recipe.rollout.whole_experts)
    counted = {own.name: own}
    for layout, engine in itertools.product(COMPARED_MIXTURES if shape.moe else COMPARED, ENGINES):
        with suppress(RecipeError):
            refit = count_refit(shape, layout, gpus, engine, dtype)
            counted.setdefault(refit.name, refit)
    return list(counted.values())
