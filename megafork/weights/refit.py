"""Hands the trained weights to the roll-out engines in the same ranks, a layer at a time, each rank the parts that its engine loads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world
from megafork.shape import Shape
from megafork.weights.mapping import Parameter
from megafork.weights.policy_weights import local_parameters
from megafork.weights.reshard import Reshard, Transfer


class Bridge:
    """One a rank. `received` and `buffer` tell of the last pass: bytes from other ranks, and the most bytes held for a layer."""

    def __init__(self, chunks: list[Policy], shape: Shape, mesh: Mesh, rollout_tp: int) -> None:
        self.mesh = mesh
        self.plan = Reshard(shape, mesh.layout, mesh.world, rollout_tp)
        self.local = local_parameters(chunks)
        self.received = self.buffer = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor of its full shape) of the whole model. Every rank of the world must iterate to the end.

        Only the part of each tensor that this rank's engine loads is defined; the rest is memory as it was found. The tensors are fresh:
        the receiver may keep them.
        """
        self.received = self.buffer = 0
        for bucket in self.plan.buckets:
            yield from self._exchange(bucket).items()

    def metrics(self) -> dict[str, float]:
        """Of the last pass, the largest over the ranks: bytes received from other ranks, and the most held for a layer. Every rank must
        call."""
        received, buffer = over_world([self.received, self.buffer], self.mesh, "max")
        return {"refit/received_mb": received / 1e6, "refit/buffer_mb": buffer / 1e6}

    def _exchange(self, bucket: list[Parameter]) -> dict[str, Tensor]:
        """One all-to-all of a bucket's parts, as bytes. What stays on this rank is copied past it."""
        me = self.mesh.rank
        sends: dict[int, list[Transfer]] = defaultdict(list)
        receives: dict[int, list[Transfer]] = defaultdict(list)
        for transfer in self.plan.transfers(bucket):
            if transfer.source == me:
                sends[transfer.target].append(transfer)
            if transfer.target == me:
                receives[transfer.source].append(transfer)
        like = next(iter(self.local.values()))
        tensors = {name: like.new_empty(self.plan.full_shape(name)) for p in bucket for name in p.huggingface()}
        for transfer in receives.pop(me, []):
            _part(tensors[transfer.name], transfer).copy_(self._held(transfer))
        sends.pop(me, None)
        outgoing = _join([self._held(t) for rank in range(self.mesh.world) for t in sends[rank]], like)
        incoming = like.new_empty(sum(t.numel for transfers in receives.values() for t in transfers))
        dist.all_to_all_single(_bytes(incoming), _bytes(outgoing), self._sizes(receives, like), self._sizes(sends, like))
        start = 0
        for rank in range(self.mesh.world):
            for transfer in receives[rank]:
                part = _part(tensors[transfer.name], transfer)
                part.copy_(incoming[start : start + transfer.numel].view_as(part))
                start += transfer.numel
        self.received += incoming.nbytes
        self.buffer = max(self.buffer, incoming.nbytes + outgoing.nbytes + sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    def _sizes(self, transfers: dict[int, list[Transfer]], like: Tensor) -> list[int]:
        return [sum(t.numel for t in transfers[rank]) * like.element_size() for rank in range(self.mesh.world)]

    def _held(self, transfer: Transfer) -> Tensor:
        """The part as it lies in this rank's shard."""
        shard = self.local[transfer.parameter].detach()
        rows = shard[transfer.at : transfer.at + transfer.rows[1] - transfer.rows[0]]
        if transfer.columns is None:
            return rows
        return rows[:, transfer.left : transfer.left + transfer.columns[1] - transfer.columns[0]]


def _part(tensor: Tensor, transfer: Transfer) -> Tensor:
    rows = tensor[transfer.rows[0] : transfer.rows[1]]
    return rows if transfer.columns is None else rows[:, transfer.columns[0] : transfer.columns[1]]


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
