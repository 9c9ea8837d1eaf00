"""A model's parameters in a distributed checkpoint: keys, sizes and chunks, as in megatron-core's sharded state dict.

The layers' parameters are stacked: one tensor per kind, with layers as the first dimension. Norms have the names of Transformer Engine's
fused layers. The gated MLP is all of gate followed by all of up, so that only the vocabulary's padding depends on the layout, and any
padding can be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megafork.shape import Shape
from megafork.weights.mapping import LAYERS, Parameter, parameters, shard_shape


@dataclass(frozen=True)
class Stored:
    """A parameter's tensor in the checkpoint: its key, its full size, and the parameter's layer within it."""

    parameter: Parameter
    key: str
    size: tuple[int, ...]

    @property
    def layer(self) -> int | None:
        return self.parameter.layer


def stored_parameters(shape: Shape, tp: int = 1) -> Iterator[Stored]:
    """Every parameter in the order of `mapping.parameters`, with the vocabulary padded for `tp`."""
    for parameter in parameters(shape):
        name = parameter.rule.fused or parameter.rule.megatron
        whole = shard_shape(parameter, shape, 1)
        if parameter.rule.kind == "vocab":
            whole = (shape.padded_vocab(tp), *whole[1:])
        if parameter.layer is None:
            yield Stored(parameter, name, whole)
        else:
            yield Stored(parameter, f"{LAYERS}.{name}", (shape.layers, *whole))


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
        yield (inner, part) if stored.layer is None else ((stored.layer, *inner), part[None])


def extra_states(layer: int, shape: Shape) -> Iterator[str]:
    """Keys of the extra states of a layer's linears: empty without FP8, but megatron-core requires them."""
    for rule in shape.family.layer:
        if rule.fp8:
            yield f"{LAYERS}.{rule.module}._extra_state/shard_{layer}_{shape.layers}"
