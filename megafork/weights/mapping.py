"""How Hugging Face tensors map to Megatron's parameters, derived from the table of model families (`shape/families.py`).

Every parameter of a TP rank is a stack of rectangles of Hugging Face tensors (`Piece`). Loading copies the rectangles in, exporting
copies them out, and a resharding plan is the intersection of two such lists; none of the three depends on a model's names.

Megatron's layouts: the fused QKV holds, per key-value group, its query heads, its key and its value, and is split evenly over TP (even
if there are fewer groups than TP ranks); the gated MLP holds, on each rank, its share of gate above its share of up; output projections
are split by columns; embedding and head are padded to a multiple of TP and split by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megafork.recipe import Parallel
from megafork.shape import Family, Rule, Shape, stage_of_layer

LAYERS = "decoder.layers"
"""Megatron's name for the module that holds the numbered layers."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) and columns [start, stop) of a Hugging Face tensor (columns None: all), at row `at` of a Megatron shard."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    at: int


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model: a family's rule and, for layer parameters, the layer's number across all stages; for an
    expert's, the expert's number across all ranks."""

    family: Family
    rule: Rule
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The parameter's global name."""
        inner = self.rule.megatron.replace("*", str(self.expert))
        return inner if self.layer is None else f"{LAYERS}.{self.layer}.{inner}"

    def huggingface(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors in it."""
        return tuple(self.family.hf_name(tensor, self.layer, self.expert) for tensor in self.rule.tensors)


def parameters(shape: Shape) -> Iterator[Parameter]:
    """Every parameter once, in Megatron's order: the embedding, the layers, the final norm, the head. A tied head is omitted, since it is
    the embedding."""
    family = shape.family
    yield Parameter(family, family.embedding)
    for layer in range(shape.layers):
        yield from layer_parameters(shape, layer)
    yield Parameter(family, family.final_norm)
    if not shape.tied:
        yield Parameter(family, family.head)


def layer_parameters(shape: Shape, layer: int) -> Iterator[Parameter]:
    """Every parameter of one layer."""
    family, sparse = shape.family, shape.is_sparse(layer)
    for rule in family.sparse_layer if sparse else family.layer:
        yield Parameter(family, rule, layer)
    for expert in range(shape.mixture.experts) if sparse else ():
        for rule in family.experts:
            yield Parameter(family, rule, layer, expert)


def stage_of(parameter: Parameter, shape: Shape, layout: Parallel) -> int:
    """The pipeline stage that holds a parameter. A tied head is the first stage's embedding."""
    if parameter.layer is not None:
        return stage_of_layer(shape.layers, layout)[parameter.layer]
    return 0 if parameter.rule is shape.family.embedding else layout.pp - 1


class Shards(NamedTuple):
    """Which ranks of a pipeline stage hold which shard of a parameter: rank r of the stage, counted from its first, holds shard
    r % every - first. Ranks for which that is not between 0 and `parts` - 1 hold none."""

    parts: int
    first: int
    every: int

    def of(self, rank: int) -> int | None:
        """The shard of rank `rank` of the stage."""
        shard = rank % self.every - self.first
        return shard if 0 <= shard < self.parts else None


def shards_of(parameter: Parameter, shape: Shape, layout: Parallel) -> Shards:
    """How a parameter is split over a stage. Ranks are in Megatron's order: tp fastest, but for experts first etp, then ep."""
    if parameter.expert is None:
        return Shards(layout.tp, 0, layout.tp)
    group = parameter.expert // (shape.mixture.experts // layout.ep)
    return Shards(layout.expert_tp, group * layout.expert_tp, layout.expert_tp * layout.ep)


def huggingface_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The full shape of every Hugging Face tensor of the model, by name."""
    return {
        name: tensor.size(shape)
        for parameter in parameters(shape)
        for name, tensor in zip(parameter.huggingface(), parameter.rule.tensors, strict=True)
    }


def full_shape(name: str, shape: Shape) -> tuple[int, ...]:
    """The shape of one Hugging Face tensor of the family."""
    found = shape.family.find(name)
    assert found is not None, name
    return found[1].size(shape)


def shard_shape(parameter: Parameter, shape: Shape, tp: int) -> tuple[int, ...]:
    """Shape of the parameter on one TP rank."""
    fulls = [tensor.size(shape) for tensor in parameter.rule.tensors]
    rest = fulls[0][1:]
    match parameter.rule.kind:
        case "vocab":
            return (shape.padded_vocab(tp) // tp, *rest)
        case "qkv" | "gated":
            return (sum(full[0] for full in fulls) // tp, *rest)
        case "row":
            return (fulls[0][0], fulls[0][1] // tp)
        case "replicated":
            return fulls[0]


def pieces(parameter: Parameter, shape: Shape, tp: int, rank: int) -> list[Piece]:
    """The rectangles of Hugging Face tensors in TP rank `rank`'s shard, in row order. Rows that no piece covers are vocabulary padding."""
    name = parameter.huggingface()[0]
    rows = shard_shape(parameter, shape, tp)[0]
    match parameter.rule.kind:
        case "vocab":
            start, stop = min(rank * rows, shape.vocab), min((rank + 1) * rows, shape.vocab)
            return [Piece(name, (start, stop), None, 0)] if stop > start else []
        case "qkv":
            return _cut(_fused_qkv(_blocks(parameter, shape), shape), rank * rows, (rank + 1) * rows)
        case "gated":
            return _cut(_gated(_blocks(parameter, shape), tp), rank * rows, (rank + 1) * rows)
        case "row":
            width = shard_shape(parameter, shape, tp)[1]
            return [Piece(name, (0, rows), (rank * width, (rank + 1) * width), 0)]
        case "replicated":
            return [Piece(name, (0, rows), None, 0)]


class Block(NamedTuple):
    """Full-width rows of a Hugging Face tensor: `height` rows starting at `first`."""

    name: str
    first: int
    height: int


def _blocks(parameter: Parameter, shape: Shape) -> Iterator[Block]:
    """A parameter's rows, one block per axis (such as queries), whether the axes have separate tensors or share one."""
    for name, tensor in zip(parameter.huggingface(), parameter.rule.tensors, strict=True):
        first = 0
        for axis in tensor.rows:
            yield Block(name, first, axis.size(shape))
            first += axis.size(shape)


def _fused_qkv(blocks: Iterator[Block], shape: Shape) -> Iterator[Block]:
    """The fused QKV from top to bottom."""
    q, k, v = blocks
    d = shape.head_dim
    queries = shape.heads // shape.kv_heads * d
    for group in range(shape.kv_heads):
        yield Block(q.name, q.first + group * queries, queries)
        yield Block(k.name, k.first + group * d, d)
        yield Block(v.name, v.first + group * d, d)


def _gated(blocks: Iterator[Block], tp: int) -> Iterator[Block]:
    """The gated MLP of all TP ranks, stacked from top to bottom."""
    gate, up = blocks
    rows = gate.height // tp
    for rank in range(tp):
        yield Block(gate.name, gate.first + rank * rows, rows)
        yield Block(up.name, up.first + rank * rows, rows)


def _cut(blocks: Iterator[Block], start: int, stop: int) -> list[Piece]:
    """The parts of stacked blocks that lie in rows [start, stop) of the stack."""
    cut, top = [], 0
    for name, first, height in blocks:
        low, high = max(top, start), min(top + height, stop)
        if low < high:
            cut.append(Piece(name, (first + low - top, first + high - top), None, low - start))
        top += height
    return cut
