"""What a layer with experts keeps, computes and sends, per token, where it differs from a dense one.

Each token goes as `per_token` copies to the ranks that hold its experts (Megatron's all-to-all dispatcher, nothing dropped). There they are
sorted by expert and computed, in plain layers by one expert after the other, in fused ones by all together, and come back. Derived from
`model/experts.py`, megatron-core 0.16.1 and Transformer Engine 2.11.
"""

from __future__ import annotations

from dataclasses import dataclass

from megafork.plan.hardware import BUSIEST, GPUS_PER_NODE, NETWORK, Gpu
from megafork.recipe import Parallel
from megafork.shape import Shape


def skew(layout: Parallel) -> float:
    """Copies on the rank that gets the most of them, as a multiple of the mean. Exactly 1 if every rank has all experts."""
    return BUSIEST if layout.ep > 1 else 1.0


@dataclass(frozen=True)
class Copies:
    """Copies of tokens, per token of a CP rank (whose TP ranks each route their share)."""

    sent: float
    """That a rank sends, to itself included."""
    received: float
    """That a rank computes, on its shard of the experts."""

    @classmethod
    def of(cls, shape: Shape, layout: Parallel, skew: float) -> Copies:
        sent = shape.mixture.per_token / layout.tp
        return cls(sent, sent * layout.expert_tp * skew)


def kept(shape: Shape, layout: Parallel, width: int, skew: float, *, fused: bool, on_cpu: bool) -> float:
    """Bytes that a layer's router, dispatcher and experts keep for the backward."""
    moe, copies = shape.mixture, Copies.of(shape, layout, skew)
    masked = 0 if fused else 5 * moe.experts  # fp32 weights and a mask, of every expert, from which plain layers take the chosen ones
    routing = masked + 12 * moe.per_token + _sorting(shape, fused=fused)  # choices, their weights
    inner = width * moe.ffn / layout.expert_tp
    places = 8 if fused and moe.experts > layout.ep else 0  # there and back, where a rank has several experts
    # sorted tokens and their weights; gate and up, their weighted product, and on the CPU also silu, up again, and the product itself
    return routing / layout.tp + copies.received * (width * shape.hidden + 4 + places + (6 if on_cpu else 3) * inner)


def _sorting(shape: Shape, *, fused: bool) -> int:
    """Bytes that say where a token's copies are: two numbers for every expert, and how many, or one for each copy."""
    return 4 * (2 * shape.mixture.experts + 1) if fused else 8 * shape.mixture.per_token


def weights_of_a_token(shape: Shape, layout: Parallel) -> float:
    """Weights of a layer's router and experts by which a token is multiplied on the busiest rank."""
    moe = shape.mixture
    return shape.hidden * (moe.experts + 3 * moe.per_token * moe.ffn * skew(layout))


def held(shape: Shape, layout: Parallel, *, fused: bool) -> float:
    """Bytes that a layer's dispatcher holds until its next forward: weights, choices, and the sorting."""
    return (5 * shape.mixture.experts + _sorting(shape, fused=fused)) / layout.tp


def moved_by_plain(shape: Shape, layout: Parallel, width: int) -> float:
    """Bytes that plain layers move and fused ones do not, in a forward or a backward: a token's copies, or their gradients, are added one
    by one to a sum in memory, and what each expert made is joined (in the backward, the gradients of what each was given)."""
    copies = Copies.of(shape, layout, skew(layout))
    return 2 * width * shape.hidden * (copies.sent + copies.received)


def working(shape: Shape, layout: Parallel, width: int, skew: float) -> float:
    """Bytes at the peak of a layer's forward on top of what it keeps: tokens as sent and as they arrive, and outputs before and after they
    are joined or, with etp, sorted and added up, in fp32."""
    copies, etp = Copies.of(shape, layout, skew), layout.expert_tp
    arriving = copies.received / etp
    elements = copies.sent + (arriving if layout.ep > 1 else 0.0) + 2 * copies.received  # without ep, what arrives is what was sent
    added = (copies.received if width < 4 else 0.0) + arriving if etp > 1 else 0.0
    return shape.hidden * (width * elements + 4 * added)


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in one pass of one layer, dispatch and combination together, per token of a CP rank."""

    in_node: float
    between_nodes: float

    def seconds(self, gpu: Gpu, share: float) -> float:
        return (self.in_node / gpu.link + self.between_nodes / NETWORK) / share


def traffic(shape: Shape, layout: Parallel, width: int) -> Sent:
    """A token's copies are sent one by one, also if several of its experts are on one rank. With etp the ranks that share an expert first
    gather the tokens and, in fp32, add up what they made of them. Those ranks, and those among which experts are distributed, are
    consecutive."""
    copies, etp, ranks = Copies.of(shape, layout, 1.0), layout.expert_tp, layout.ep * layout.expert_tp
    row = width * shape.hidden
    exchanged = 2 * row * copies.sent  # to and from all ranks of the expert-parallel group
    far = max(0.0, 1 - max(GPUS_PER_NODE, etp) / ranks)
    own = 1 / layout.ep
    shared = (row + 4 * shape.hidden) * copies.received * (etp - 1) / etp
    return Sent(exchanged * (1 - far - own) + shared * (etp <= GPUS_PER_NODE), exchanged * far + shared * (etp > GPUS_PER_NODE))


def touched(shape: Shape, batch: float) -> float:
    """Share of a layer's experts that at least one of `batch` tokens goes to, if tokens chose independently and all experts alike."""
    moe = shape.mixture
    return 1.0 - (1.0 - moe.per_token / moe.experts) ** batch
