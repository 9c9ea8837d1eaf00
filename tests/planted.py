"""Faults that fail or stall on a GPU, planted in real functions of the package; `# here` marks the line that a rehearsal must name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rehearsal.ledger import Kind
from torch import Tensor

from megafork.model.attention import PackedCoreAttention
from megafork.model.policy import RMSNorm
from megafork.rl import packing
from megafork.rl.batch import MicroBatch
from megafork.train import update


@dataclass(frozen=True)
class Fault:
    plant: Callable[[pytest.MonkeyPatch], None]
    kind: Kind
    place: str
    """file:line of the planted line, or the file of the package in which it shows."""
    in_layer: bool = False


FAULTS: dict[str, Fault] = {}


def fault(name: str, kind: Kind, *, of: str | None = None, in_layer: bool = False) -> Callable[[Any], Any]:
    def register(plant: Callable[[pytest.MonkeyPatch], None]) -> Any:
        lines, start = inspect.getsourcelines(plant)
        marked = next((n for n, line in enumerate(lines) if "# here" in line), 0)
        FAULTS[name] = Fault(plant, kind, of or f"tests/planted.py:{start + marked}", in_layer)
        return plant

    return register


def _after_packing(patch: pytest.MonkeyPatch, change: Callable[[MicroBatch], None]) -> None:
    original = packing.pack

    def pack(*args: Any, **kwargs: Any) -> MicroBatch:
        micro = original(*args, **kwargs)
        change(micro)
        return micro

    patch.setattr(packing, "pack", pack)


def _in_the_loss(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    original = update.policy_loss
    patch.setattr(update, "policy_loss", lambda log_prob, micro, **how: original(change(log_prob), micro, **how))


def _in_the_norm(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    original = RMSNorm.forward
    patch.setattr(RMSNorm, "forward", lambda self, hidden: original(self, change(hidden)))


def _in_attention(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    original = PackedCoreAttention.forward

    def forward(self: PackedCoreAttention, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, change(query), *args, **kwargs)

    patch.setattr(PackedCoreAttention, "forward", forward)


@fault("an index left on the host", "refused", of="megafork/rl/draws.py")
def _host_index(patch: pytest.MonkeyPatch) -> None:
    def change(micro: MicroBatch) -> None:
        micro.offset = micro.offset.cpu()

    _after_packing(patch, change)


@fault("an index copied by indexing", "wait")
def _implicit_copy(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        order = torch.arange(len(log_prob))
        return log_prob[order]  # here

    _in_the_loss(patch, change)


@fault("a host tensor in a group of NCCL", "refused")
def _host_tensor_to_nccl(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        total = torch.tensor([len(log_prob)])
        dist.all_reduce(total, group=dist.new_group(backend="nccl"))  # here
        return log_prob

    _in_the_loss(patch, change)


@fault("a device tensor in a group of gloo", "wait")
def _device_tensor_to_gloo(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        dist.all_reduce(log_prob.detach().sum(), group=dist.new_group(backend="gloo"))  # here
        return log_prob

    _in_the_loss(patch, change)


@fault("tolist in a layer", "wait", in_layer=True)
def _tolist(patch: pytest.MonkeyPatch) -> None:
    def change(hidden: Tensor) -> Tensor:
        hidden.shape[0] and hidden.detach()[0].flatten().tolist()  # here
        return hidden

    _in_the_norm(patch, change)


@fault("item in attention", "wait", in_layer=True)
def _item(patch: pytest.MonkeyPatch) -> None:
    def change(query: Tensor) -> Tensor:
        return query / query.detach().abs().max().clamp(max=1.0).item()  # here

    _in_attention(patch, change)


@fault("bool of a device tensor", "wait", in_layer=True)
def _bool(patch: pytest.MonkeyPatch) -> None:
    def change(query: Tensor) -> Tensor:
        if query.isnan().any():  # here
            raise ValueError("NaN")
        return query

    _in_attention(patch, change)


@fault("an index that is a mask, in a layer", "wait", in_layer=True)
def _mask_index(patch: pytest.MonkeyPatch) -> None:
    def change(hidden: Tensor) -> Tensor:
        hidden[hidden.detach() > 100].sum()  # here
        return hidden

    _in_the_norm(patch, change)


@fault("torch.tensor on the device in a loop", "wait")
def _tensor_in_a_loop(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        for n in range(3):
            log_prob = log_prob + torch.tensor([n * 1e-3], device=log_prob.device)  # here
        return log_prob

    _in_the_loss(patch, change)


@fault("a conversion to numpy", "refused")
def _numpy(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        np.asarray(log_prob.detach())  # here
        return log_prob

    _in_the_loss(patch, change)


@fault("a mask made on the host", "refused", in_layer=True)
def _host_mask(patch: pytest.MonkeyPatch) -> None:
    def change(query: Tensor) -> Tensor:
        mask = torch.ones(len(query), len(query), dtype=torch.bool).tril()
        (query[:, 0, :1] * query[None, :, 0, 0]).detach().masked_fill(mask, 0.0)  # here
        return query

    _in_attention(patch, change)


@fault("arange without a device in attention", "refused", in_layer=True)
def _arange(patch: pytest.MonkeyPatch) -> None:
    def change(query: Tensor) -> Tensor:
        return query + 0.0 * torch.arange(len(query))[:, None, None]  # here

    _in_attention(patch, change)


@fault("an asynchronous copy from pageable memory", "pageable")
def _pageable(patch: pytest.MonkeyPatch) -> None:
    def change(micro: MicroBatch) -> None:
        micro.advantage = torch.zeros(len(micro.advantage)).to(micro.advantage.device, non_blocking=True)  # here

    _after_packing(patch, change)


@fault("cpu in the loss", "wait")
def _cpu(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        return log_prob.cpu().clamp(max=0.0).to(log_prob.device)  # here

    _in_the_loss(patch, change)


@fault("every rank waits for the device", "wait")
def _synchronize(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        torch.cuda.synchronize()  # here
        return log_prob

    _in_the_loss(patch, change)


@fault("a device index into a host table", "refused")
def _host_table(patch: pytest.MonkeyPatch) -> None:
    def change(log_prob: Tensor) -> Tensor:
        table = torch.zeros(len(log_prob))
        return log_prob + table[torch.zeros(len(log_prob), dtype=torch.int64, device=log_prob.device)]  # here

    _in_the_loss(patch, change)
