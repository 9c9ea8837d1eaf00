"""Forward and backward of the head, TP 2: log-prob and entropy with both gradients, ours at all positions and at a fifth of them.

With a narrow hidden size (64) the time is spent on the logits, and the targets refer to that. At Qwen3-0.6B's hidden size (1,024) it is
spent on matrix products in fp32: ours does four (the backward recomputes the logits instead of keeping them), verl three, so on a CPU no
head can be twice as fast as verl's. The remaining advantages are memory, and a fifth of the work at a fifth of the positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import on_ranks
from torch import Tensor

from benchmarks import peers
from benchmarks.figure import Figure, Series, interleaved
from benchmarks.peers import Head
from megafork.parallel.vocab import log_prob_and_entropy

TP = 2
SHARE = 5  # one position in five
OURS, OURS_LOG_PROB, OURS_SPARSE = "megafork", "megafork, gradient of the log-prob only", "megafork, a fifth of the positions"
VERL, MEGATRON = "verl", "Megatron's cross-entropy (no entropy)"


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    """Divisible by TP."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and targets, equal on every rank, and this rank's weight; logits have about the spread of a trained model's."""
        alike = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(1 + dist.get_rank())
        hidden = torch.randn(self.tokens, self.hidden, generator=alike)
        weight = torch.randn(self.vocab // TP, self.hidden, generator=own) * (3.0 / self.hidden**0.5)
        return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(self.vocab, (self.tokens,), generator=alike)


def run(quick: bool) -> list[Figure]:
    shapes = [Shape(64, 16, 1024)] if quick else [Shape(4096, 64, 151_936), Shape(4096, 1024, 151_936)]
    return [figure for shape in shapes for figure in _figures(shape, repeats=3)]


def _figures(shape: Shape, repeats: int) -> list[Figure]:
    series = on_ranks(TP, _times, shape, repeats, timeout_s=3600)[0]
    where = f"head, forward + backward: N {shape.tokens:,}, H {shape.hidden:,}, V {shape.vocab:,}, TP {TP}"
    return [
        Figure(where, "s", series[OURS], series[VERL], at_least=2.0),
        Figure(where, "s", series[OURS_SPARSE], series[VERL], at_least=8.0, note="verl at all positions"),
        Figure(where, "s", series[OURS_LOG_PROB], series[MEGATRON], note="ours also gives the entropy"),
    ]


def _times(shape: Shape, repeats: int) -> dict[str, Series]:
    parallel_state.initialize_model_parallel(TP)
    hidden, weight, targets = shape.inputs()
    fifth = hidden.detach()[::SHARE].clone().requires_grad_(), weight, targets[::SHARE]
    verl = peers.verl_head()
    _check_alike(verl, ours, hidden, weight, targets)
    calls = {
        OURS: lambda: forward_backward(ours, hidden, weight, targets),
        VERL: lambda: forward_backward(verl, hidden, weight, targets),
        OURS_SPARSE: lambda: forward_backward(ours, *fifth),
        OURS_LOG_PROB: lambda: forward_backward(ours, hidden, weight, targets, with_entropy=False),
        MEGATRON: lambda: forward_backward(peers.megatron_head, hidden, weight, targets, with_entropy=False),
    }
    return interleaved(calls, repeats)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return log_prob_and_entropy(hidden, weight, targets, vocab_size=TP * len(weight), group=dist.group.WORLD, entropy_grad=True)


def forward_backward(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool = True) -> None:
    """`with_entropy`: whether the entropy has a gradient too. The gradients are left in `.grad`."""
    hidden.grad = weight.grad = None
    log_prob, entropy = head(hidden, weight, targets)
    (log_prob.sum() + entropy.sum() if with_entropy else log_prob.sum()).backward()


def _check_alike(first: Head, second: Head, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Times are comparable only if both compute the same."""
    few = hidden.detach()[:64].clone().requires_grad_()
    found = []
    for head in (first, second):
        log_prob, entropy = head(few, weight, targets[:64])
        found.append(torch.cat([log_prob, entropy, *torch.autograd.grad(log_prob.sum() + entropy.sum(), few)[0].t()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
