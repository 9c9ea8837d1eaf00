"""A model's parameters in a distributed checkpoint: keys, sizes and chunks, as in megatron-core's sharded state dict.

The layers' parameters are stacked, one tensor per kind with layers as the first dimension, and so are the experts' of a layer. If only
some layers have experts, each layer has tensors of its own. Norms have the names of Transformer Engine's fused layers. The gated MLP is all
of gate followed by all of up, so that only the vocabulary's padding depends on the layout, and any padding can be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megafork.shape import Shape
from megafork.weights.mapping import LAYERS, Parameter, parameters, shard_shape


@dataclass(frozen=True)
class Stored:
    """A parameter's tensor in the checkpoint: its key, its full size, and the parameter's place in the tensor's first dimensions."""

    parameter: Parameter
    key: str
    size: tuple[int, ...]
    index: tuple[int, ...] = ()
    """The layer, if layers are stacked, then the expert."""


def are_stacked(shape: Shape) -> bool:
    """Whether a parameter of all layers is one tensor, with layers as its first dimension: not if only some layers have experts."""
    return shape.moe is None or not shape.has_mlp


def stored_parameters(shape: Shape, tp: int = 1) -> Iterator[Stored]:
    """Every parameter in the order of `mapping.parameters`, with the vocabulary padded for `tp`."""
    for parameter in parameters(shape):
        rule = parameter.rule
        name = rule.fused or rule.megatron if parameter.expert is None else rule.megatron.replace("local_experts.*", "experts")
        whole = shard_shape(parameter, shape, 1)
        if parameter.rule.kind == "vocab":
            whole = (shape.padded_vocab(tp), *whole[1:])
        if parameter.layer is None:
            yield Stored(parameter, name, whole)
            continue
        stacks = [(parameter.layer, shape.layers)] if are_stacked(shape) else []
        if parameter.expert is not None:
            stacks.append((parameter.expert, shape.mixture.experts))
        key = f"{LAYERS}.{name}" if are_stacked(shape) else f"{LAYERS}.{parameter.layer}.{name}"
        yield Stored(parameter, key, (*(size for _, size in stacks), *whole), tuple(place for place, _ in stacks))


def chunks(stored: Stored, shard: Tensor, tp: int, rank: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offset, chunk) of TP rank `rank`'s shard. A replicated parameter belongs to rank 0."""
    rows = shard.size(0)
    match stored.parameter.rule.kind:
        case "vocab" | "qkv":
            cut = [((rank * rows, 0), shard)]
        case "gated":
            gate, up = shard.chunk(2)
            cut = [((rank * rows // 2, 0), gate), (((tp + rank) * rows // 2, 0), up)]
        case "row":
            cut = [((0, rank * shard.size(1)), shard)]
        case "replicated":
            cut = [((0, 0), shard)] if rank == 0 else []
    for offset, part in cut:
        inner = offset[: part.dim()]
        yield (*stored.index, *inner), part[(None,) * len(stored.index)]


def extra_state(stored: Stored) -> str | None:
    """Key of the extra state of the linear to which a parameter belongs: empty without FP8, but megatron-core requires it."""
    if not stored.parameter.rule.fp8:
        return None
    places, sizes = stored.index or (0,), stored.size[: len(stored.index)] or (1,)
    return f"{stored.key.removesuffix('.weight')}._extra_state/shard_{'.'.join(map(str, places))}_{'.'.join(map(str, sizes))}"
