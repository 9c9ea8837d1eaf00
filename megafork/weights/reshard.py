"""Plans which rank sends which part of which tensor to which rank when trained weights go to the roll-out engines.

Both sides are lists of rectangles of Hugging Face tensors: `mapping.pieces` lists what a training rank holds, `needed` what an engine's
rank loads, and a transfer is an intersection of the two. The plan needs no communication: every rank computes its own part, and the parts
agree. A rank that already holds a part sends it to itself, so none receives a byte that it has, or that its engine does not load.

A part that no rank of a node holds and several of its engines load crosses to the node once: one of its ranks receives it and passes it on
to the others. So a bucket is sent in two rounds, `Transfer.relayed` being the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megafork.recipe import Parallel
from megafork.shape import Shape, Span
from megafork.weights.mapping import Parameter, Piece, Shards, full_shape, parameters, pieces, shards_of, stage_of

Part = tuple[Span, Span | None]
"""Rows and columns of a Hugging Face tensor; columns None if it is one-dimensional."""


class Transfer(NamedTuple):
    """Rows and columns (None if one-dimensional) of a Hugging Face tensor, sent from one rank to another."""

    source: int
    target: int
    name: str
    rows: Span
    columns: Span | None
    parameter: str
    """Global name of the Megatron parameter that holds it."""
    at: int
    """Row of the holder's shard at which `rows` starts."""
    left: int
    """Column of the holder's shard at which `columns` starts."""
    relayed: bool
    """Whether the source does not hold it, but has received it in the first round from a holder on another node."""

    @property
    def numel(self) -> int:
        return area(self.rows, self.columns)


class Route(NamedTuple):
    """One rank's transfers to and from each rank, itself included, in one round."""

    sends: dict[int, list[Transfer]]
    receives: dict[int, list[Transfer]]


class Overlap(NamedTuple):
    """What a shard of a parameter has in common with what a rank of an engine loads."""

    tensor: int
    """Number of the Hugging Face tensor within the parameter."""
    rows: Span
    columns: Span | None
    at: int
    left: int


@dataclass(frozen=True)
class Reshard:
    """The plan for one model, training layout, number of ranks and engine size. `node`: ranks per node; links within a node are fast.
    `whole_experts`: an engine's ranks share its experts instead of splitting each (`rollout.whole_experts`)."""

    shape: Shape
    layout: Parallel
    world: int
    rollout_tp: int
    node: int = 8
    whole_experts: bool = False

    def needed(self, name: str, rank: int) -> list[Part]:
        """The parts of a Hugging Face tensor that the engine of a rank of the world loads there."""
        return needed(name, self.shape, self.rollout_tp, rank % self.rollout_tp, whole_experts=self.whole_experts)

    def owner(self, parameter: Parameter) -> int | None:
        """The rank of every engine that alone loads a whole expert; None: all load the parameter, or a part of it."""
        if parameter.expert is None or not self.whole_experts:
            return None
        return expert_owner(parameter.expert, self.shape, self.rollout_tp)

    @cached_property
    def buckets(self) -> list[list[Parameter]]:
        """Groups of parameters that are sent together: the embedding, each layer, the final norm, the head."""
        together = itertools.groupby(parameters(self.shape), key=lambda p: (p.layer, p.rule if p.layer is None else None))
        return [list(group) for _, group in together]

    @cached_property
    def alike(self) -> list[tuple[list[Parameter], int]]:
        """One representative of each group of buckets with the same transfers, and the group's size."""
        kinds: dict[tuple[int, str, int, int], list[list[Parameter]]] = {}
        for bucket in self.buckets:
            first = bucket[0]
            kinds.setdefault((self.stage(first), first.rule.megatron, len(bucket), self._turn(first)), []).append(bucket)
        return [(buckets[0], len(buckets)) for buckets in kinds.values()]

    @property
    def rounds(self) -> int:
        """Rounds in which a bucket is sent: 2 if there are several nodes."""
        return 1 if self.world <= self.node else 2

    def transfers(self, bucket: list[Parameter]) -> Iterator[Transfer]:
        """The transfers of all ranks, including those of a rank to itself, in the same order on every rank."""
        for parameter in bucket:
            for target in range(self.world):
                yield from self._to(target, parameter)

    def routes(self, rank: int) -> list[list[Route]]:
        """One rank's transfers of each bucket, by round, computed without enumerating those of others."""
        return [self._routes(rank, bucket) for bucket in self.buckets]

    def _routes(self, rank: int, bucket: list[Parameter]) -> list[Route]:
        routes = [Route({}, {}) for _ in range(self.rounds)]
        for parameter in bucket:
            for transfer in self._to(rank, parameter):
                routes[transfer.relayed].receives.setdefault(transfer.source, []).append(transfer)
            for target in self._served(rank, parameter):
                for transfer in self._to(target, parameter):
                    if transfer.source == rank:
                        routes[transfer.relayed].sends.setdefault(target, []).append(transfer)
        return routes

    def full_shape(self, name: str) -> tuple[int, ...]:
        return full_shape(name, self.shape)

    def stage(self, parameter: Parameter) -> int:
        """The pipeline stage that holds a parameter."""
        return self._stages[parameter.layer, parameter.rule.megatron]

    @cached_property
    def _stages(self) -> dict[tuple[int | None, str], int]:
        return {(each.layer, each.rule.megatron): stage_of(each, self.shape, self.layout) for each in parameters(self.shape)}

    def _to(self, target: int, parameter: Parameter) -> Iterator[Transfer]:
        """The transfers to one rank."""
        node, engine_rank, names = target // self.node, target % self.rollout_tp, parameter.huggingface()
        for shard in self._shards(target, parameter):
            near = self._near(target, parameter, shard)
            for overlap in self._overlaps(parameter, shard, engine_rank):
                source, relayed = near, False
                if source is None:
                    entry = self._entry(node, parameter, shard, overlap)
                    source, relayed = (self._far(node, parameter, shard), False) if entry == target else (entry, True)
                tensor, rows, columns, at, left = overlap
                yield Transfer(source, target, names[tensor], rows, columns, parameter.name, at, left, relayed)

    def _served(self, rank: int, parameter: Parameter) -> Iterator[int]:
        """Ranks that may get something of a parameter from this one: those of its node, and those of the nodes for which it is `_far`."""
        own = rank // self.node
        yield from self._ranks(own)
        stage = self._holders(parameter)
        shard = self._spread(parameter).of(rank - stage.start) if rank in stage else None
        if shard is None:
            return
        holders = self._holding(parameter, shard)
        first = (holders.index(rank) - self._turn(parameter)) % len(holders)
        for node in range(first, -(-self.world // self.node), len(holders)):
            if node != own:
                yield from self._ranks(node)

    def _shards(self, target: int, parameter: Parameter) -> range:
        """The shards that a rank needs: all, or one TP rank's of a parameter that each of them holds whole."""
        tp = self.layout.tp
        if parameter.rule.kind != "replicated":
            return range(self._spread(parameter).parts)
        holders, own = self._holders(parameter), target % tp
        shared = [rank % tp for rank in self._ranks(target // self.node) if rank in holders]
        # all ranks of a node without a holder must choose the same
        one = own if target in holders or own in shared else shared[0] if shared else target // self.node % tp
        return range(one, one + 1)

    def _near(self, target: int, parameter: Parameter, shard: int) -> int | None:
        """The rank that holds a shard on the target's node: the target itself if it can be, else any, with the load spread evenly."""
        holders = self._holding(parameter, shard)
        if target in holders:
            return target
        near = [rank for rank in self._ranks(target // self.node) if rank in holders]
        return near[target // self._spread(parameter).every % len(near)] if near else None

    def _far(self, node: int, parameter: Parameter, shard: int) -> int:
        """The holder of a shard that sends it to a node without one, with the load spread evenly."""
        holders = self._holding(parameter, shard)
        return holders[(node + self._turn(parameter)) % len(holders)]

    def _entry(self, node: int, parameter: Parameter, shard: int, overlap: Overlap) -> int:
        """The rank that receives a part for a node without a holder, of those that load it, with the load spread evenly."""
        loading = [rank for rank in self._ranks(node) if overlap in self._overlaps(parameter, shard, rank % self.rollout_tp)]
        return loading[(shard + self._turn(parameter)) % len(loading)]

    def _ranks(self, node: int) -> range:
        return range(node * self.node, min((node + 1) * self.node, self.world))

    def _holders(self, parameter: Parameter) -> range:
        """The ranks of the stage that holds a parameter."""
        per_stage = self.world // self.layout.pp
        return range(self.stage(parameter) * per_stage, (self.stage(parameter) + 1) * per_stage)

    def _holding(self, parameter: Parameter, shard: int) -> range:
        """The ranks that hold a shard of a parameter."""
        spread = self._spread(parameter)
        return self._holders(parameter)[spread.first + shard :: spread.every]

    def _spread(self, parameter: Parameter) -> Shards:
        return shards_of(parameter, self.shape, self.layout)

    def _turn(self, parameter: Parameter) -> int:
        """Lets ranks that could do the same work take turns, layer by layer."""
        return (parameter.layer or 0) % self.node

    def _overlaps(self, parameter: Parameter, shard: int, engine_rank: int) -> tuple[Overlap, ...]:
        """What a shard has in common with what an engine's rank loads; the same in every layer, and for every expert of an owner."""
        key = (parameter.rule.megatron, shard, engine_rank, self.owner(parameter))
        if key not in self._known:
            self._known[key] = tuple(self._intersect(parameter, shard, engine_rank))
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[str, int, int, int | None], tuple[Overlap, ...]]:
        return {}

    def _intersect(self, parameter: Parameter, shard: int, engine_rank: int) -> Iterator[Overlap]:
        names = parameter.huggingface()
        wanted = {name: self.needed(name, engine_rank) for name in names}
        for piece in pieces(parameter, self.shape, self._spread(parameter).parts, shard):
            for part in wanted[piece.name]:
                if common := meet(*part, piece):
                    rows, columns = common
                    left = columns[0] - (piece.columns[0] if piece.columns else 0) if columns else 0
                    yield Overlap(names.index(piece.name), rows, columns, piece.at + rows[0] - piece.rows[0], left)


def needed(name: str, shape: Shape, tp: int, rank: int, *, whole_experts: bool = False) -> list[Part]:
    """The parts of a Hugging Face tensor that rank `rank` of a vLLM engine of `tp` ranks loads: one part per axis of its rows; none of
    another rank's expert, if `whole_experts`."""
    found = shape.family.find(name)
    assert found is not None, name
    rule, tensor = found
    if whole_experts and rule in shape.family.experts:
        if expert_owner(shape.family.expert_of(name), shape, tp) != rank:
            return []
        tp, rank = 1, 0
    columns = tensor.columns.part(shape, tp, rank) if tensor.columns else None
    parts, top = [], 0
    for axis in tensor.rows:
        start, stop = axis.part(shape, tp, rank)
        parts.append(((top + start, top + stop), columns))
        top += axis.size(shape)
    return parts


def expert_owner(expert: int, shape: Shape, tp: int) -> int:
    """The rank of a vLLM engine of `tp` ranks that holds an expert, if they share the experts: consecutive ones, equally many each."""
    return expert // (shape.mixture.experts // tp)


def meet(rows: Span, columns: Span | None, piece: Piece) -> Part | None:
    """The part of these rows and columns that lies in the piece."""
    height = _overlap(rows, piece.rows)
    width = _overlap(columns, piece.columns or columns) if columns else None
    return (height, width) if height and (width or not columns) else None


def _overlap(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


def area(rows: Span, columns: Span | None) -> int:
    return (rows[1] - rows[0]) * (columns[1] - columns[0] if columns else 1)
