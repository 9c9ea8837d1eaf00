"""The vocab-parallel head against float64 at TP 1, 2 and 4: values, gradients, memory, collectives, and what it must not touch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor
from vocab_cases import Case, Result, assert_close, check_on_ranks, head, heads, reference, world

from megafork.parallel.vocab import log_prob_and_entropy


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    width=st.integers(1, 9),
    vocab=st.integers(1, 70),
    padding=st.integers(0, 5),
    chunk=st.one_of(st.none(), st.integers(1, 50)),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
    one_temperature=st.booleans(),
)
def test_values_and_gradients(
    seed: int, n: int, width: int, vocab: int, padding: int, chunk: int | None, scale: float, one_temperature: bool
) -> None:
    case = Case.random(seed, n, width, vocab, vocab + padding, scale, chunk=chunk)
    if one_temperature:
        case = replace(case, temperature=0.7)
    assert_close(head(case), reference(case))


@pytest.mark.parametrize("tp", [2, 4])
def test_values_and_gradients_over_ranks(tp: int) -> None:
    cases = [
        Case.random(0),
        Case.random(1, n=1),
        Case.random(2, n=37, chunk=1),
        Case.random(3, n=300, vocab=1001, padded=1024, chunk=7),
        Case.random(4, vocab=9, padded=32),  # at TP 4 two ranks hold padding only
        Case.random(5, targets=torch.zeros(13, dtype=torch.int64)),  # all but the first rank own no target
        Case.random(6, targets=torch.full((13,), 29)),
        Case.random(7, temperature=1.0, grad_entropy=torch.zeros(13)),
        Case.random(8, grad_log_prob=torch.zeros(13)),
        Case.random(9, hidden=torch.zeros(13, 8)),  # equal logits: entropy log V
    ]
    check_on_ranks(tp, cases)


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_inputs_are_computed_in_fp32(tp: int) -> None:
    case = Case.random(0, n=50, width=64, vocab=300, padded=304, scale=0.5)
    half = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16(), chunk=20)
    found = on_ranks(tp, heads, [half])
    expected = reference(half)
    for log_prob, entropy, grad_hidden, _ in (rank[0] for rank in found):
        torch.testing.assert_close(log_prob.double(), expected.log_prob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_hidden, expected.grad_hidden.bfloat16(), rtol=2**-7, atol=1e-5)
    grad_weight = torch.cat([rank[0][3] for rank in found])
    torch.testing.assert_close(grad_weight, expected.grad_weight.bfloat16(), rtol=2**-7, atol=1e-5)


def of_logits(logits: Tensor, targets: list[int], **over: Any) -> Case:
    """A case whose logits are exactly `logits` [n, vocab]: the weight is their transpose, the hidden states are unit vectors."""
    n, vocab = logits.shape
    ones = torch.ones(n)
    case = Case(torch.eye(n), logits.t().contiguous(), torch.tensor(targets), 1.0, vocab, ones, ones)
    return replace(case, **over)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_extreme_logits(tp: int) -> None:
    logits = torch.tensor(
        [
            [1e4, -1e4, 0, 0, 0, 0, 9999, 1e4],
            [-1e4] * 8,
            [3.0] * 8,
            [1e4, 1e4, 1e4, 1e4, -1e4, -1e4, -1e4, -1e4],
            [0, 0, 0, 0, 0, 0, 0, 5000],
        ]
    )
    cases = [of_logits(logits, targets, chunk=chunk) for targets in ([0, 3, 7, 5, 7], [1, 0, 0, 0, 0]) for chunk in (None, 1)]
    check_on_ranks(tp, cases, 1e-6)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_logit_of_minus_infinity_has_probability_zero_and_adds_nothing(tp: int) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0], [-torch.inf, -torch.inf, -torch.inf, 4.0]])
    expected = reference(of_logits(logits.clamp(min=-1e9), [2, 3]))
    for log_prob, entropy in on_ranks(tp, infinite_logits, logits):
        torch.testing.assert_close(log_prob.double(), expected.log_prob)
        torch.testing.assert_close(entropy.double(), expected.entropy)


def infinite_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows one at a time, each by a single feature of 1, so that no 0 * inf enters the product."""
    shards = [row[:, None].chunk(world().size())[world().rank()] for row in logits]
    found = [
        log_prob_and_entropy(torch.ones(1, 1), shard, torch.tensor([target]), vocab_size=4, group=world())
        for shard, target in zip(shards, (2, 3), strict=True)
    ]
    return torch.cat([log_prob for log_prob, _ in found]), torch.cat([entropy for _, entropy in found])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    case = Case.random(0, n=300, width=64, vocab=5003, padded=5056, scale=0.3, chunk=100)
    case = replace(case, hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    expected = reference(case)
    on_gpu: dict[str, Any] = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in vars(case).items()}
    found = head(Case(**on_gpu))
    found = Result(found.log_prob.cpu(), found.entropy.cpu(), found.grad_hidden.cpu(), found.grad_weight.cpu())
    if dtype == torch.float32:
        assert_close(found, expected)
    else:  # the logits' gradient and the results are rounded to bf16
        torch.testing.assert_close(found.log_prob.double(), expected.log_prob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.grad_hidden.double(), expected.grad_hidden, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found.grad_weight.double(), expected.grad_weight, rtol=2e-2, atol=2e-2)


def test_entropy_carries_no_gradient_unless_asked() -> None:
    case = Case.random(0)
    hidden = case.hidden.requires_grad_()
    log_prob, entropy = log_prob_and_entropy(hidden, case.weight, case.targets, vocab_size=30, group=None)
    assert log_prob.requires_grad and not entropy.requires_grad
    with torch.no_grad():
        log_prob, _ = log_prob_and_entropy(hidden, case.weight, case.targets, vocab_size=30, group=None, entropy_grad=True)
    assert log_prob.grad_fn is None


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_nothing_given_is_changed(entropy_grad: bool) -> None:
    case = Case.random(0)
    assert isinstance(case.temperature, Tensor)
    given = [case.hidden.requires_grad_(), case.weight.requires_grad_(), case.targets, case.temperature]
    before = [tensor.detach().clone() for tensor in given]
    log_prob, entropy = log_prob_and_entropy(*given[:3], temperature=given[3], vocab_size=30, group=None, entropy_grad=entropy_grad)
    results = [log_prob.detach().clone(), entropy.detach().clone()]
    (log_prob.sum() + (entropy.sum() if entropy_grad else 0)).backward()
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
    assert torch.equal(log_prob, results[0]) and torch.equal(entropy, results[1])


def test_no_token_still_gives_a_graph_with_zero_gradients() -> None:
    for _ in on_ranks(2, no_token):
        pass


def no_token() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    log_prob, entropy = log_prob_and_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), vocab_size=6, group=world())
    assert log_prob.shape == entropy.shape == (0,)
    log_prob.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(3, 4))


def test_frozen_inputs() -> None:
    case = Case.random(0)
    expected = reference(replace(case, grad_entropy=torch.zeros(13)))
    for trained in ("hidden", "weight"):
        leaf = getattr(case, trained).clone().requires_grad_()
        given = {"hidden": case.hidden, "weight": case.weight, trained: leaf}
        log_prob, _ = log_prob_and_entropy(**given, targets=case.targets, temperature=case.temperature, vocab_size=30, group=None)
        log_prob.backward(case.grad_log_prob)
        torch.testing.assert_close(leaf.grad.double(), getattr(expected, f"grad_{trained}"), rtol=1e-5, atol=1e-5)


def test_a_target_out_of_the_vocabulary_gives_nan_not_a_number_that_looks_right() -> None:
    case = Case.random(0, targets=torch.tensor([*range(11), 31, -1]))
    log_prob, entropy = log_prob_and_entropy(case.hidden, case.weight, case.targets, vocab_size=30, group=None)
    assert log_prob.isnan().tolist() == [False] * 11 + [True, True] and entropy.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(12, dtype=torch.int64)}, "do not fit"),
        ({"targets": torch.zeros(13, dtype=torch.int32)}, "do not fit"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": torch.ones(2)}, "temperature"),
        ({"vocab_size": 33}, "vocab_size is 33"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(replace(Case.random(0), **change))
