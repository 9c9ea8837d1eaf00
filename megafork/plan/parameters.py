"""Exact weights, gradients and optimizer state of a rank, computed from the layout of Megatron's flat buffers.

Megatron's DDP puts the parameters of a model chunk into one flat buffer, last parameter first, each at a multiple of 64 elements, and
ends each bucket at a multiple of 128 and of the number of ranks that share it (`ParamAndGradBuffer`). The weights are views of one such
buffer, the fp32 gradients fill another, and each of the DP x CP ranks with the same weights keeps the optimizer state of its part of each
bucket. With expert parallelism experts have buffers of their own, shared by the ranks that hold the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from megafork.recipe import Parallel, Recipe
from megafork.shape import Rule, Shape, stage_layers
from megafork.weights.mapping import Parameter, shard_shape

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
class Shared:
    """The buffers of parameters that the same ranks share, one per model chunk. Rank r of the stage holds part r % `every`; the `shards`
    ranks that hold the same part share its optimizer state."""

    buffers: tuple[Buffer, ...]
    every: int
    shards: int

    @cached_property
    def parameters(self) -> int:
        return sum(buffer.parameters for buffer in self.buffers)

    @property
    def elements(self) -> int:
        """Number of elements, including padding."""
        return sum(buffer.elements for buffer in self.buffers)

    @cached_property
    def held(self) -> list[int]:
        """Parameters whose optimizer state each of the `shards` ranks keeps."""
        return [sum(held) for held in zip(*(buffer.shards(self.shards) for buffer in self.buffers), strict=True)]


@dataclass(frozen=True)
class Weights:
    """Weights of a rank of one pipeline stage, equally many on every rank. `kinds`: all parameters, or, with expert parallelism, those of
    experts apart."""

    kinds: tuple[Shared, ...]
    dtype: str

    @cached_property
    def parameters(self) -> int:
        return sum(kind.parameters for kind in self.kinds)

    @property
    def weight_bytes(self) -> int:
        return sum(kind.elements for kind in self.kinds) * WIDTH[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """fp32 whatever the weights' dtype is."""
        return sum(kind.elements for kind in self.kinds) * 4

    @cached_property
    def optimizer_bytes(self) -> list[int]:
        """For each rank of the stage: two fp32 moments and, with bf16 weights, the fp32 main weights."""
        tensors = STATE_TENSORS + (1 if self.dtype == "bf16" else 0)
        ranks = self.kinds[0].every * self.kinds[0].shards
        return [4 * tensors * sum(kind.held[rank // kind.every] for kind in self.kinds) for rank in range(ranks)]

    @property
    def step_bytes(self) -> int:
        """Temporary memory of an optimizer step: on a GPU torch's AdamW takes the root of all second moments at once. Experts are stepped
        apart."""
        return 4 * max(max(kind.held) for kind in self.kinds)

    @property
    def state_written(self) -> float:
        """Parameters whose weights and optimizer state a rank writes to a checkpoint: its share of what its replicas hold together."""
        return sum(kind.parameters / kind.shards for kind in self.kinds)


def distinct(shape: Shape) -> Iterator[tuple[Parameter, int]]:
    """One parameter for all that are alike in the whole model, and how many they are: the layers with experts are, those without, and all
    experts. A tied head is omitted."""
    family = shape.family
    sparse = len(shape.moe.layers) if shape.moe else 0
    yield Parameter(family, family.embedding), 1
    for rules, layers in ((family.layer, shape.layers - sparse), (family.sparse_layer, sparse)):
        yield from ((Parameter(family, rule, 0), layers) for rule in rules if layers)
    if shape.moe is not None:
        yield from ((Parameter(family, rule, 0, 0), sparse * shape.moe.experts) for rule in family.experts)
    yield Parameter(family, family.final_norm), 1
    if not shape.tied:
        yield Parameter(family, family.head), 1


def over_model(shape: Shape, size: Callable[[Parameter], int]) -> int:
    """Sum of `size` over every parameter of the model."""
    return sum(size(parameter) * times for parameter, times in distinct(shape))


def count_of(parameter: Parameter, shape: Shape) -> int:
    """Elements of a whole parameter, without vocabulary padding."""
    return sum(math.prod(tensor.size(shape)) for tensor in parameter.rule.tensors)


def count_parameters(shape: Shape) -> int:
    """Parameters of the whole model; a tied head counts once, vocabulary padding not at all."""
    return over_model(shape, lambda parameter: count_of(parameter, shape))


def count_active(shape: Shape) -> int:
    """Parameters that a token meets: all but the experts that it does not go to."""
    total, moe = count_parameters(shape), shape.moe
    experts = over_model(shape, lambda parameter: count_of(parameter, shape) if parameter.expert is not None else 0)
    return total if moe is None else total - experts + experts * moe.per_token // moe.experts


def layer_parameters(shape: Shape, *, sparse: bool) -> tuple[int, int]:
    """Parameters of one layer, in (what all tokens share, its experts)."""
    family = shape.family
    rules = family.sparse_layer if sparse else family.layer
    shared = sum(count_of(Parameter(family, rule, 0), shape) for rule in rules)
    return shared, sum(count_of(Parameter(family, rule, 0, 0), shape) for rule in family.experts) * shape.mixture.experts if sparse else 0


def chunk_layers(shape: Shape, layout: Parallel, stage: int, chunk: int) -> range:
    """The layers of one model chunk of a stage."""
    counts = [count // layout.vpp for count in stage_layers(shape.layers, layout)]
    first = chunk * sum(counts) + sum(counts[:stage])
    return range(first, first + counts[stage])


def stage_weights(shape: Shape, recipe: Recipe, stage: int, ranks: int) -> Weights:
    """The weights on a rank of pipeline stage `stage` when the recipe's layout runs on `ranks` ranks."""
    return _stage_weights(shape, recipe.parallel, recipe.precision.dtype, stage, ranks, recipe.optimizer.overlap)


@lru_cache(maxsize=4096)  # a search asks again for each kind of recomputation
def _stage_weights(shape: Shape, layout: Parallel, dtype: str, stage: int, ranks: int, overlap: bool) -> Weights:
    shards = ranks // (layout.tp * layout.pp)
    every = layout.ep * layout.expert_tp
    others, experts = [], []
    for chunk in range(layout.vpp):
        split = overlap and stage == 0 and chunk == 0
        bucket = max(40_000_000, 1_000_000 * (shards // layout.cp)) if split else None
        of_others, of_experts = _chunk_sizes(shape, layout, stage, chunk)
        others.append(lay_out(of_others, shards, bucket))
        experts.append(lay_out(of_experts, ranks // layout.pp // every, bucket))
    kinds = [Shared(tuple(others), layout.tp, shards)]
    if any(buffer.spans for buffer in experts):
        kinds.append(Shared(tuple(experts), every, ranks // layout.pp // every))
    return Weights(tuple(kinds), dtype)


Sizes = list[tuple[int, bool]]
"""(elements, whether it is a tied embedding shared by two stages) of each parameter, in Megatron's order."""


def _chunk_sizes(shape: Shape, layout: Parallel, stage: int, chunk: int) -> tuple[Sizes, Sizes]:
    """The parameters of a chunk on one rank: those that lie in the buffer of all others, and those in the experts' own, which only expert
    parallelism has."""
    family, shared = shape.family, shape.tied and layout.pp > 1
    others: Sizes = []
    experts: Sizes = []

    def size(rule: Rule, parts: int = layout.tp) -> int:
        return math.prod(shard_shape(Parameter(family, rule), shape, parts))

    if stage == 0 and chunk == 0:
        others.append((size(family.embedding), shared))
    for layer in chunk_layers(shape, layout, stage, chunk):
        sparse = shape.is_sparse(layer)
        others += [(size(rule), False) for rule in (family.sparse_layer if sparse else family.layer)]
        if sparse:
            each = [(size(rule, layout.expert_tp), False) for rule in family.experts]
            (others if layout.ep == 1 else experts).extend(each * (shape.mixture.experts // layout.ep))
    if stage == layout.pp - 1 and chunk == layout.vpp - 1:
        others.append((size(family.final_norm), False))
        if shared or not shape.tied:
            others.append((size(family.tied_head if shape.tied else family.head), shared))
    return others, experts


def lay_out(sizes: Sizes, shards: int, bucket_size: int | None) -> Buffer:
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
