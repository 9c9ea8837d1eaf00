"""The head under Megatron's DDP, its memory and collectives, and rows of a sequence-parallel hidden state."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import Sent, peak_bytes
from ranks import on_ranks
from torch import Tensor
from vocab_cases import Case, reference, world

from megafork.compat import cpu
from megafork.parallel.vocab import chunk_for, gather_rows, log_prob_and_entropy

cpu.install()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

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
