"""Exact weights, gradients and optimizer state of a rank, computed from the layout of Megatron's flat buffers.

Megatron's DDP puts the parameters of a model chunk into one flat buffer, last parameter first, each at a multiple of 64 elements, and
ends each bucket at a multiple of 128 and of the number of ranks that share it (`ParamAndGradBuffer`). The weights are views of one such
buffer, the fp32 gradients fill another, and each of the DP x CP ranks with the same weights keeps the optimizer state of its part of each
bucket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megafork.recipe import Recipe
from megafork.shape import Rule, Shape, stage_layers
from megafork.weights.mapping import Parameter, parameters, shard_shape

WIDTH = {"fp32": 4, "bf16": 2}
"""Bytes per number."""
_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
STATE_TENSORS = 2
"""Adam's two moments, in fp32."""


@dataclass(frozen=True)
class Buffer:
    """The flat buffer of one model chunk: (start, stop) of each parameter and of each bucket, in elements."""

    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Number of elements, including padding."""
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def parameters(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def shards(self, ranks: int) -> list[int]:
        """Parameters, without padding, whose optimizer state is kept by each of the `ranks` that share the buffer."""
        held = [0] * ranks
        for first, last in self.buckets:
            size = (last - first) // ranks
            for start, stop in self.spans:
                for rank in range((start - first) // size, (stop - first - 1) // size + 1) if first <= start < last else ():
                    low = first + rank * size
                    held[rank] += min(stop, low + size) - max(start, low)
        return held


@dataclass(frozen=True)
class Weights:
    """Weights of a rank of one pipeline stage, the same on every TP rank. `shards`: the DP x CP ranks that share the optimizer."""

    buffers: tuple[Buffer, ...]
    shards: int
    dtype: str

    @cached_property
    def parameters(self) -> int:
        return sum(buffer.parameters for buffer in self.buffers)

    @property
    def weight_bytes(self) -> int:
        return sum(buffer.elements for buffer in self.buffers) * WIDTH[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """fp32 whatever the weights' dtype is."""
        return sum(buffer.elements for buffer in self.buffers) * 4

    @cached_property
    def optimizer_bytes(self) -> list[int]:
        """For each DP x CP rank: two fp32 moments and, with bf16 weights, the fp32 main weights."""
        tensors = STATE_TENSORS + (1 if self.dtype == "bf16" else 0)
        return [4 * tensors * held for held in self._shards]

    @property
    def step_bytes(self) -> int:
        """Temporary memory of an optimizer step: on a GPU torch's AdamW takes the root of all second moments at once."""
        return 4 * max(self._shards)

    @cached_property
    def _shards(self) -> list[int]:
        return [sum(held) for held in zip(*(buffer.shards(self.shards) for buffer in self.buffers), strict=True)]


def over_model(shape: Shape, size: Callable[[Parameter], int]) -> int:
    """Sum of `size` over every parameter of the model. All layers are alike, so only the first is inspected."""
    one = replace(shape, layers=1)
    return sum(size(parameter) * (1 if parameter.layer is None else shape.layers) for parameter in parameters(one))


def count_parameters(shape: Shape) -> int:
    """Parameters of the whole model; a tied head counts once, vocabulary padding not at all."""
    return over_model(shape, lambda parameter: sum(math.prod(tensor.size(shape)) for tensor in parameter.rule.tensors))


def stage_weights(shape: Shape, recipe: Recipe, stage: int, ranks: int) -> Weights:
    """The weights on a rank of pipeline stage `stage` when the recipe's layout runs on `ranks` ranks."""
    layout = recipe.parallel
    shards = ranks // (layout.tp * layout.pp)
    buffers = []
    for chunk in range(layout.vpp):
        split = recipe.optimizer.overlap and stage == 0 and chunk == 0
        bucket = max(40_000_000, 1_000_000 * (shards // layout.cp)) if split else None
        buffers.append(lay_out(list(_chunk_sizes(shape, recipe, stage, chunk)), shards, bucket))
    return Weights(tuple(buffers), shards, recipe.precision.dtype)


def _chunk_sizes(shape: Shape, recipe: Recipe, stage: int, chunk: int) -> Iterator[tuple[int, bool]]:
    """(elements, whether it is a tied embedding shared by two stages) of each parameter of a chunk on one TP rank, in Megatron's order."""
    layout, family = recipe.parallel, shape.family
    shared = shape.tied and layout.pp > 1

    def size(rule: Rule) -> int:
        return math.prod(shard_shape(Parameter(family, rule), shape, layout.tp))

    if stage == 0 and chunk == 0:
        yield size(family.embedding), shared
    for _ in range(stage_layers(shape.layers, layout)[stage] // layout.vpp):
        yield from ((size(rule), False) for rule in family.layer)
    if stage == layout.pp - 1 and chunk == layout.vpp - 1:
        yield size(family.final_norm), False
        if shared or not shape.tied:
            yield size(family.tied_head if shape.tied else family.head), shared


def lay_out(sizes: list[tuple[int, bool]], shards: int, bucket_size: int | None) -> Buffer:
    """The buffer for parameters of these sizes; one shared by two stages gets a separate bucket. `bucket_size`: elements after which a
    bucket ends; None: a single bucket."""
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    divisor = math.lcm(shards, _BUCKET_ALIGNMENT)
    end = first = 0
    filled = False

    def close() -> None:
        nonlocal end, first, filled
        end = -(-end // divisor) * divisor
        buckets.append((first, end))
        first, filled = end, False

    for size, alone in reversed(sizes):
        end = -(-end // _ALIGNMENT) * _ALIGNMENT
        if alone and filled:
            close()
        spans.append((end, end + size))
        end, filled = end + size, True
        if alone or (bucket_size is not None and end - first >= bucket_size):
            close()
    if filled:
        close()
    return Buffer(tuple(spans), tuple(buckets))
