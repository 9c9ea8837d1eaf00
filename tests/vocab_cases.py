"""Hidden states and a head for `parallel/vocab.py`, their log-probs, entropies and gradients, and the same in plain float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from megafork.parallel.vocab import log_prob_and_entropy


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


@dataclass(frozen=True)
class Case:
    """Inputs of one call, whole (not sharded), and the gradients that come back from the loss."""

    hidden: Tensor
    weight: Tensor
    """[padded vocabulary, H]"""
    targets: Tensor
    temperature: float | Tensor
    vocab_size: int
    grad_log_prob: Tensor
    grad_entropy: Tensor
    chunk: int | None = None

    @staticmethod
    def random(seed: int, n: int = 13, width: int = 8, vocab: int = 30, padded: int = 32, scale: float = 1.0, **over: Any) -> Case:
        g = torch.Generator().manual_seed(seed)
        case = Case(
            hidden=torch.randn(n, width, generator=g) * scale,
            weight=torch.randn(padded, width, generator=g),
            targets=torch.randint(vocab, (n,), generator=g),
            temperature=0.3 + torch.rand(n, generator=g),
            vocab_size=vocab,
            grad_log_prob=torch.randn(n, generator=g),
            grad_entropy=torch.randn(n, generator=g),
        )
        return replace(case, **over)


@dataclass(frozen=True)
class Result:
    log_prob: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def reference(case: Case) -> Result:
    """float64, all at once, by torch's own autograd."""
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    temperature = case.temperature.double()[:, None] if isinstance(case.temperature, Tensor) else case.temperature
    log_p = (hidden @ weight[: case.vocab_size].t() / temperature).log_softmax(-1)
    log_prob = log_p.gather(1, case.targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)
    (log_prob @ case.grad_log_prob.double() + entropy @ case.grad_entropy.double()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return Result(log_prob.detach(), entropy.detach(), hidden.grad, weight.grad)


def head(case: Case, group: dist.ProcessGroup | None = None) -> Result:
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.chunk(size)[rank].clone().requires_grad_()
    log_prob, entropy = log_prob_and_entropy(
        hidden,
        weight,
        case.targets,
        temperature=case.temperature,
        vocab_size=case.vocab_size,
        group=group,
        entropy_grad=True,
        chunk=case.chunk,
    )
    torch.autograd.backward([log_prob, entropy], [case.grad_log_prob, case.grad_entropy])
    assert hidden.grad is not None and weight.grad is not None
    return Result(log_prob.detach(), entropy.detach(), hidden.grad, weight.grad)


def assert_close(found: Result, expected: Result, tolerance: float = 1e-5) -> None:
    assert found.log_prob.dtype == found.entropy.dtype == torch.float32
    for name in ("log_prob", "entropy", "grad_hidden", "grad_weight"):
        actual, wanted = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance * max(1.0, float(wanted.abs().max())), msg=name)


def heads(cases: list[Case]) -> list[list[Tensor]]:
    """On a rank of a TP group: each case's result, as plain tensors."""
    results = [head(case, world()) for case in cases]
    return [[r.log_prob, r.entropy, r.grad_hidden, r.grad_weight] for r in results]


def check_on_ranks(tp: int, cases: list[Case], tolerance: float = 1e-5) -> None:
    ranks = on_ranks(tp, heads, cases)
    for i, case in enumerate(cases):
        expected = reference(case)
        for found in ranks:  # every rank has the whole log-prob, entropy and gradient of the hidden states
            whole = torch.cat([shards[i][3] for shards in ranks])
            log_prob, entropy, grad_hidden, _ = found[i]
            assert_close(Result(log_prob, entropy, grad_hidden, whole), expected, tolerance)
