"""The vocab-parallel head against float64 at TP 1, 2 and 4: values, gradients, memory, collectives, and what it must not touch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import Sent, peak_bytes
from ranks import on_ranks
from torch import Tensor

from megafork.compat import cpu
from megafork.parallel.vocab import chunk_for, gather_rows, log_prob_and_entropy

cpu.install()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402


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


# --- with Megatron's DDP


def main_grad_under_ddp(case: Case, tied: bool, overlap: bool) -> Tensor:
    parallel_state.initialize_model_parallel(1)
    module: Any = torch.nn.Module()
    module.weight = torch.nn.Parameter(case.weight.clone())
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap), module)
    for sync in (ddp.no_sync(), nullcontext()):  # two micro-batches add up
        hidden = module.weight[case.targets] if tied else case.hidden
        log_prob, _ = log_prob_and_entropy(hidden, module.weight, case.targets, vocab_size=30, group=None)
        with sync:
            log_prob.backward(case.grad_log_prob)
    ddp.finish_grad_sync()
    assert module.weight.grad is None
    return module.weight.main_grad


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_holds_the_head_s_gradient_and_a_tied_embedding_s(dtype: torch.dtype, tied: bool, overlap: bool) -> None:
    case = Case.random(0, temperature=1.0, grad_entropy=torch.zeros(13))
    case = replace(case, hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    expected = reference(replace(case, hidden=case.weight[case.targets]) if tied else case)
    wanted = expected.grad_weight
    if tied:
        wanted = wanted.index_add(0, case.targets, expected.grad_hidden)
    tolerance = 2e-2 if tied and dtype == torch.bfloat16 else 1e-5  # autograd carries the embedding's gradient in the weight's type
    for found in on_ranks(2, main_grad_under_ddp, case, tied, overlap):
        torch.testing.assert_close(found.double(), 2 * wanted, rtol=tolerance, atol=tolerance)


# --- what it costs


def peak_of_head(n: int, chunk: int, entropy_grad: bool, dtype: torch.dtype) -> int:
    """Bytes of forward and backward above the inputs."""
    hidden = torch.randn(n, 2).to(dtype).requires_grad_()
    weight = torch.randn(6000, 2).to(dtype).requires_grad_()
    targets = torch.randint(6000, (n,))

    def forward_and_backward() -> None:
        log_prob, entropy = log_prob_and_entropy(
            hidden, weight, targets, vocab_size=6000, group=None, entropy_grad=entropy_grad, chunk=chunk
        )
        (log_prob.sum() + (entropy.sum() if entropy_grad else 0)).backward()

    return peak_bytes(forward_and_backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_peak_memory_is_one_chunk_however_many_tokens(entropy_grad: bool, dtype: torch.dtype) -> None:
    chunk, size = 40, dtype.itemsize
    small, large = (peak_of_head(n, chunk, entropy_grad, dtype) for n in (128, 16 * 128))
    per_token = 2 * (size + 4 + 4) + 4 * 16  # gradient of the hidden states (result, and rows in fp32), and some vectors
    assert large - small < 15 * 128 * per_token
    weights = 6000 * 2 * (4 + (size if dtype == torch.bfloat16 else 0))
    assert large < 4 * chunk * 6000 + weights + 16 * 128 * per_token + 2**14


def collectives_of_a_call() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    case = Case.random(0, n=100, chunk=3)
    hidden = case.hidden.requires_grad_()
    weight = case.weight.chunk(2)[dist.get_rank()]
    with Sent() as forward:
        log_prob, _ = log_prob_and_entropy(hidden, weight, case.targets, vocab_size=30, group=world(), chunk=200)
    with Sent() as backward:
        log_prob.sum().backward()
    return forward.calls, backward.calls


def test_two_all_reduces_forward_and_one_backward() -> None:
    for forward, backward in on_ranks(2, collectives_of_a_call):
        assert forward == [("allreduce_", 100 * 4), ("allreduce_", 3 * 100 * 4)]
        assert backward == [("allreduce_", 100 * 8 * 4)]


def test_chunk_fills_the_memory_it_is_given() -> None:
    assert chunk_for(256, 151_936) == 441 and 441 * 151_936 * 4 <= 256 * 2**20
    assert chunk_for(1, 10**9) == 1


# --- rows of a sequence-parallel hidden state


def gathered(positions: list[int]) -> tuple[Tensor, Tensor, list[tuple[str, int]]]:
    group = world()
    whole = torch.arange(24.0).view(12, 2)
    local = whole.chunk(group.size())[group.rank()].clone().requires_grad_()
    with Sent() as sent:
        rows = gather_rows(local, torch.tensor(positions, dtype=torch.int64), group)
        rows.backward(torch.arange(1.0, 1 + 2 * len(positions)).view(-1, 2))
    assert local.grad is not None
    return rows.detach(), local.grad, sent.calls


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("positions", [[], [0], [11, 0, 5, 6, 3], [9, 10, 11], list(range(12)), [4, 4, 7]])
def test_gather_rows(tp: int, positions: list[int]) -> None:
    whole = torch.arange(24.0).view(12, 2)
    expected = torch.zeros(12, 2).index_add_(
        0, torch.tensor(positions, dtype=torch.int64), torch.arange(1.0, 1 + 2 * len(positions)).view(-1, 2)
    )
    found = on_ranks(tp, gathered, positions)
    assert torch.equal(torch.cat([gradient for _, gradient, _ in found]), expected)
    for rows, _, calls in found:
        assert torch.equal(rows, whole[positions])
        assert [name for name, _ in calls] == (["_allgather_base_"] if positions and tp > 1 else [])
