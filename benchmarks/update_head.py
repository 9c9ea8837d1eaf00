"""Head and loss of an update with Qwen3-0.6B's head: a fifth of the positions against all of them, and against verl's logits.

Ours holds one chunk of logits at either share, so a fifth of the positions saves little memory, because little is used; the last row shows
the saving against logits kept for all positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from measure import peak_bytes
from megatron.core import parallel_state
from ranks import on_ranks
from torch import Tensor

from benchmarks import peers
from benchmarks.figure import Figure, Series, interleaved
from benchmarks.head_time import TP, Shape
from benchmarks.peers import Head
from megafork.parallel.vocab import log_prob_and_entropy
from megafork.recipe import Loss
from megafork.rl.objectives import Tokens, clip

SPARSE, DENSE, VERL = "megafork, rho 0.2", "megafork, rho 1.0", "verl, rho 1.0"


def run(quick: bool) -> list[Figure]:
    shape = Shape(50, 16, 1024) if quick else Shape(2000, 1024, 151_936)
    times, peaks = on_ranks(TP, _costs, shape, 3, timeout_s=3600)[0]
    memory = {name: Series(name, [peak]) for name, peak in peaks.items()}
    where = f"head + loss of an update: N {shape.tokens:,}, H {shape.hidden:,}, V {shape.vocab:,}, TP {TP}"
    constant = "ours is one chunk in both cases, whatever N is"
    return [
        Figure(where, "s", times[SPARSE], times[DENSE], at_least=4.0),
        Figure(where, "s", times[SPARSE], times[VERL]),
        Figure(f"{where}: peak extra", "MB", memory[SPARSE], memory[DENSE], note=constant),
        Figure(f"{where}: peak extra", "MB", memory[SPARSE], memory[VERL], at_least=5.0),
    ]


def _costs(shape: Shape, repeats: int) -> tuple[dict[str, Series], dict[str, float]]:
    parallel_state.initialize_model_parallel(TP)
    hidden, weight, targets = shape.inputs()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]  # Megatron's DDP keeps the gradient here
    forks = torch.arange(0, shape.tokens, 5)
    every = torch.arange(shape.tokens)
    verl = peers.verl_head()
    calls = {
        SPARSE: lambda: _update(_ours, hidden, weight, targets, forks),
        DENSE: lambda: _update(_ours, hidden, weight, targets, every),
        VERL: lambda: _update(verl, hidden, weight, targets, every),
    }
    times = interleaved(calls, repeats)
    return times, {name: _peak(call, hidden, weight) for name, call in calls.items()}


def _peak(call: Callable[[], None], hidden: Tensor, weight: Tensor) -> float:
    hidden.grad = weight.grad = None
    return peak_bytes(call) / 1e6


def _update(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> None:
    hidden.grad = weight.grad = None
    log_prob, _ = head(hidden[positions], weight, targets[positions])
    advantage = torch.where(positions % 2 == 0, 1.0, -1.0)
    loss, _ = clip(Tokens(log_prob, log_prob.detach(), advantage, torch.zeros_like(positions), 1), Loss())
    loss.mean().backward()


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return log_prob_and_entropy(hidden, weight, targets, vocab_size=TP * len(weight), group=dist.group.WORLD)
