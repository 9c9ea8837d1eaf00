"""What a layer with experts keeps, computes and sends, per token, where it differs from a dense one.

Each token goes as `per_token` copies to the ranks that hold its experts (Megatron's all-to-all dispatcher, nothing dropped), is sorted by
expert, computed by one expert after the other, and comes back. Derived from `model/experts.py` and megatron-core 0.16.1.
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


def kept(shape: Shape, layout: Parallel, width: int, skew: float) -> float:
    """Bytes that a layer's router, dispatcher and experts keep for the backward."""
    moe, copies = shape.mixture, Copies.of(shape, layout, skew)
    routing = 5 * moe.experts + 20 * moe.per_token  # fp32 weights and a mask, of every expert; choices, their weights, the sorting
    inner = width * moe.ffn / layout.expert_tp
    # sorted tokens and their weights; gate and up, silu, up again, their product, and that weighted
    return routing / layout.tp + copies.received * (width * shape.hidden + 4 + 6 * inner)


def inner(shape: Shape, layout: Parallel) -> float:
    """Elements of the experts' inner activations per token of a CP rank."""
    return Copies.of(shape, layout, skew(layout)).received * shape.mixture.ffn / layout.expert_tp


def weights_of_a_token(shape: Shape, layout: Parallel) -> float:
    """Weights of a layer's router and experts by which a token is multiplied on the busiest rank."""
    moe = shape.mixture
    return shape.hidden * (moe.experts + 3 * moe.per_token * moe.ffn * skew(layout))


def held(shape: Shape, layout: Parallel) -> float:
    """Bytes that a layer's dispatcher holds until its next forward: weights, choices, and the sorting."""
    return (5 * shape.mixture.experts + 8 * shape.mixture.per_token) / layout.tp


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
