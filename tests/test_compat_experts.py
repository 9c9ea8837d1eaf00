"""The patches of Megatron's mixtures of experts in megafork.compat: they still fail without each, and work with it. See test_compat.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from megafork.compat import experts as expert_fixes

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


def _router_logits() -> tuple[str, torch.Tensor]:
    """What upstream's router says without Transformer Engine, and what it computes with the fix."""
    from megatron.core.transformer.moe import moe_utils

    hidden, weight = torch.arange(6.0).reshape(3, 1, 2), torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    said = _failure(lambda: moe_utils.router_gating_linear(hidden, weight, None, torch.float32))
    expert_fixes.run_without_transformer_engine()
    return said, moe_utils.router_gating_linear(hidden, weight, None, torch.float32)


def _failure(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - what it says is the test's result
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_the_router_runs_without_transformer_engine() -> None:
    [(said, logits)] = on_ranks(1, _router_logits)
    assert said.startswith("NameError: name 'te_general_gemm'"), "upstream defines it"
    assert torch.equal(logits, torch.tensor([[[2.0, -1.0]], [[8.0, -3.0]], [[14.0, -5.0]]]))


def _events() -> list[bool]:
    """Whether the dispatcher's stream gives an event beside vLLM: by the class that it takes, and with the fix."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from vllm.v1.worker.cpu import shm

    expert_fixes.wait_for_no_stream()
    return [stream.record_event() is not None for stream in (shm.torch.cuda.Stream(), MoEAlltoAllTokenDispatcher.cuda_dtoh_stream)]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs vLLM's worker for the CPU, which a GPU's vLLM does not use")
def test_the_dispatcher_waits_for_no_stream_beside_vllm() -> None:
    [[upstream, ours]] = on_ranks(1, _events, engines=True)
    assert ours
    assert not upstream, "vLLM's stand-in for a stream now gives events"


def _uneven_exchange() -> dict[str, Any]:
    """Rank r has r + 1 rows: what upstream says of it, and what comes with the fixes, forward and backward."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    rows = torch.full((rank + 1, 2), float(rank + 1), requires_grad=True)
    sent, received = torch.tensor([rank + 1, 0]), torch.tensor([1, 2]) if rank == 0 else torch.tensor([0, 0])
    gather = mappings.gather_from_sequence_parallel_region
    seen: dict[str, Any] = {
        "splits upstream": _failure(lambda: mappings.all_to_all(world, rows, received, sent)),
        "gather upstream": _failure(lambda: gather(rows, group=world, output_split_sizes=[1, 2])),
    }
    expert_fixes.read_splits_on_host()
    expert_fixes.gather_uneven_rows()
    to_host = token_dispatcher.maybe_move_tensor_to_cpu
    seen["splits"] = mappings.all_to_all(world, rows, to_host(received, as_numpy=True), to_host(sent, as_numpy=True)).detach()
    seen["gather"] = gather(rows, group=world, output_split_sizes=[1, 2])
    (seen["gather"] * torch.tensor([[1.0], [10.0], [100.0]]) * (rank + 1)).sum().backward()
    seen["gather"], seen["gradient"] = seen["gather"].detach(), rows.grad
    return seen


def test_tokens_of_uneven_number_are_exchanged_over_gloo() -> None:
    first, second = on_ranks(2, _uneven_exchange)
    for seen in (first, second):
        for name in ("splits", "gather"):
            assert seen[f"{name} upstream"], f"upstream's {name} works now"
        assert seen["gather"][:, 0].tolist() == [1.0, 2.0, 2.0]
    assert first["splits"][:, 0].tolist() == [1.0, 2.0, 2.0] and second["splits"].shape == (0, 2)
    assert first["gradient"][:, 0].tolist() == [3.0] and second["gradient"][:, 0].tolist() == [30.0, 300.0]
