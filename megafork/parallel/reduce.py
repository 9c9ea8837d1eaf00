"""Numbers for the log: reduced over the ranks that hold different tokens, with the result on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.mesh import Mesh
from megafork.parallel.to_device import to_device

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def over_tokens(values: Mapping[str, Tensor | float], mesh: Mesh, op: Literal["sum", "max"] = "sum") -> dict[str, float]:
    """Reduce in float64 over the last stage's DP x CP ranks, one TP rank each. Every rank of the world must call.

    Only the last pipeline stage's values count; other stages may pass an empty mapping.
    """
    names: list[Any] = [sorted(values)]
    dist.broadcast_object_list(names, src=mesh.world - 1)  # in Megatron's order the last rank is in the last stage
    counts = mesh.is_last_stage and mesh.tp_rank == 0
    neutral = 0.0 if op == "sum" else -torch.inf
    mine = torch.full((len(names[0]),), neutral, dtype=torch.float64, device=mesh.device)
    if counts:
        for slot, name in zip(mine, names[0], strict=True):  # fills and copies on the device
            slot.fill_(values[name])
    return dict(zip(names[0], _reduced(mine, op), strict=True))


def over_world(values: list[float], mesh: Mesh, op: Literal["sum", "max"] = "sum") -> list[float]:
    """Reduce numbers elementwise in float64 over all ranks. Every rank must call, with the same number of them."""
    return _reduced(to_device(torch.tensor(values, dtype=torch.float64), mesh.device), op)


def all_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the group's ranks, in place, on the values' device. Every rank of the group must call; with None, this rank alone counts."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def _reduced(tensor: Tensor, op: Literal["sum", "max"]) -> list[float]:
    dist.all_reduce(tensor, op=_OPS[op])
    return tensor.tolist()


def from_last_stage(value: Any, mesh: Mesh) -> Any:
    """Broadcast a small object from the last pipeline stage to every rank. Every rank must call."""
    box = [value]
    dist.broadcast_object_list(box, src=mesh.world - 1)
    return box[0]
