"""Plans which rank sends which part of which tensor to which rank when trained weights go to the roll-out engines.

Both sides are lists of rectangles of Hugging Face tensors: `mapping.pieces` lists what a training rank holds, `needed` what an engine's
rank loads, and a transfer is an intersection of the two. The plan needs no communication: every rank computes the same one. A rank that
already holds a part sends it to itself, so none receives a byte that it has, or that its engine does not load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
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
    """Global name of the Megatron parameter that the source reads."""
    at: int
    """Row of the source's shard at which `rows` starts."""
    left: int
    """Column of the source's shard at which `columns` starts."""

    @property
    def numel(self) -> int:
        return area(self.rows, self.columns)


class Route(NamedTuple):
    """One rank's transfers to and from each rank, itself included."""

    sends: dict[int, list[Transfer]]
    receives: dict[int, list[Transfer]]


@dataclass(frozen=True)
class Reshard:
    """The plan for one model, training layout, number of ranks and engine size. `node`: ranks per node; links within a node are fast."""

    shape: Shape
    layout: Parallel
    world: int
    rollout_tp: int
    node: int = 8

    @cached_property
    def buckets(self) -> list[list[Parameter]]:
        """Groups of parameters that are sent together: the embedding, each layer, the final norm, the head."""
        together = itertools.groupby(parameters(self.shape), key=lambda p: (p.layer, p.rule if p.layer is None else None))
        return [list(group) for _, group in together]

    @cached_property
    def alike(self) -> list[tuple[list[Parameter], int]]:
        """One representative of each group of equal-cost buckets, and the group's size: all layers of a stage cost the same."""
        kinds: dict[tuple[int, str, int], list[list[Parameter]]] = {}
        for bucket in self.buckets:
            kinds.setdefault((self.stage(bucket[0]), bucket[0].rule.megatron, len(bucket)), []).append(bucket)
        return [(buckets[0], len(buckets)) for buckets in kinds.values()]

    def transfers(self, bucket: list[Parameter]) -> Iterator[Transfer]:
        """The transfers of all ranks, including those of a rank to itself, in the same order on every rank."""
        for parameter in bucket:
            held = self._held(parameter)
            for target in range(self.world):
                yield from self._to(target, parameter, held)

    def routes(self, rank: int) -> list[Route]:
        """One rank's transfers of each bucket, computed without enumerating those of others."""
        stage = rank // (self.world // self.layout.pp)

        @cache
        def served(shards: Shards, shard: int) -> list[int]:
            """The ranks that receive their copy of this rank's shard from it."""
            return [target for target in range(self.world) if self._source(target, stage, shards, shard) == rank]

        return [self._route(rank, bucket, served if self.stage(bucket[0]) == stage else None) for bucket in self.buckets]

    def _route(self, rank: int, bucket: list[Parameter], served: Callable[[Shards, int], list[int]] | None) -> Route:
        receives: dict[int, list[Transfer]] = {}
        sends: dict[int, list[Transfer]] = {}
        for parameter in bucket:
            shards = self._shards(parameter)
            shard = shards.of(rank % (self.world // self.layout.pp))
            held = self._held(parameter)
            for transfer in self._to(rank, parameter, held):
                receives.setdefault(transfer.source, []).append(transfer)
            for target in served(shards, shard) if served and shard is not None else ():
                if sent := list(self._to(target, parameter, held, only=shard)):
                    sends.setdefault(target, []).extend(sent)
        return Route(sends, receives)

    def full_shape(self, name: str) -> tuple[int, ...]:
        return full_shape(name, self.shape)

    def _held(self, parameter: Parameter) -> list[list[Piece]]:
        """The parameter's pieces in each shard."""
        parts = self._shards(parameter).parts
        return [pieces(parameter, self.shape, parts, shard) for shard in range(parts)]

    def _shards(self, parameter: Parameter) -> Shards:
        return shards_of(parameter, self.shape, self.layout)

    def _to(self, target: int, parameter: Parameter, held: list[list[Piece]], only: int | None = None) -> Iterator[Transfer]:
        """The transfers to one rank. `held`: the pieces of each shard; `only`: the one shard whose transfers are wanted."""
        shards, own = self._shards(parameter), target % self.layout.tp
        wanted = {name: needed(name, self.shape, self.rollout_tp, target % self.rollout_tp) for name in parameter.huggingface()}
        for shard in [own] if parameter.rule.kind == "replicated" else range(shards.parts):
            if only is not None and shard != only:
                continue
            source = self._source(target, self.stage(parameter), shards, shard)
            for piece in held[shard]:
                for part in wanted[piece.name]:
                    if common := meet(*part, piece):
                        rows, columns = common
                        left = columns[0] - (piece.columns[0] if piece.columns else 0) if columns else 0
                        yield Transfer(source, target, piece.name, rows, columns, parameter.name, piece.at + rows[0] - piece.rows[0], left)

    def _source(self, target: int, stage: int, shards: Shards, shard: int) -> int:
        """The rank that sends this shard: the target if it holds it, else a holder on its node, else any, with the load spread evenly."""
        per_stage, every = self.world // self.layout.pp, shards.every
        first = stage * per_stage + shards.first + shard
        holders = range(first, (stage + 1) * per_stage, every)
        if target in holders:
            return target
        node = target // self.node * self.node
        begin, end = (max(0, -((first - edge) // every)) for edge in (node, node + self.node))
        choice = holders[begin:end] or holders  # prefer those on the target's node
        return choice[target // every % len(choice)]

    def stage(self, parameter: Parameter) -> int:
        """The pipeline stage that holds a parameter."""
        return self._stages[parameter.name]

    @cached_property
    def _stages(self) -> dict[str, int]:
        return {parameter.name: stage_of(parameter, self.shape, self.layout) for parameter in parameters(self.shape)}


def needed(name: str, shape: Shape, tp: int, rank: int) -> list[Part]:
    """The parts of a Hugging Face tensor that rank `rank` of a vLLM engine of `tp` ranks loads: one part per axis of its rows."""
    found = shape.family.find(name)
    assert found is not None, name
    _, tensor = found
    columns = tensor.columns.part(shape, tp, rank) if tensor.columns else None
    parts, top = [], 0
    for axis in tensor.rows:
        start, stop = axis.part(shape, tp, rank)
        parts.append(((top + start, top + stop), columns))
        top += axis.size(shape)
    return parts


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
