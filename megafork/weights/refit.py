"""Transfers trained weights to the roll-out engines in the same ranks, layer by layer; each rank receives the parts its engine loads."""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world
from megafork.shape import Shape
from megafork.weights.policy_weights import local_parameters
from megafork.weights.reshard import Reshard, Route, Transfer


class Bridge:
    """Iterable source of weights, one per rank. Routes are computed once, in the constructor. `received` and `buffer` describe the last
    pass: bytes received from other ranks, and the most bytes held for one layer."""

    def __init__(
        self, chunks: list[Policy], shape: Shape, mesh: Mesh, rollout_tp: int, node: int | None = None, *, whole_experts: bool = False
    ) -> None:
        """Every rank must call. `node`: ranks per node, for the plan; unset: as many as share a host. `whole_experts`: as in `Reshard`."""
        self.mesh = mesh
        self.plan = Reshard(shape, mesh.layout, mesh.world, rollout_tp, node or _ranks_per_host(mesh), whole_experts)
        self.local = local_parameters(chunks)
        self.routes = self.plan.routes(mesh.rank)
        self.received = self.buffer = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full-shape tensor) for the whole model. Every rank of the world must iterate to the end.

        Only the part of each tensor that this rank's engine loads is defined; the rest is uninitialised. The tensors are fresh: the
        receiver may keep them.
        """
        self.received = self.buffer = 0
        like = next(iter(self.local.values()))
        for bucket, rounds in zip(self.plan.buckets, self.routes, strict=True):
            tensors = {name: like.new_empty(self.plan.full_shape(name)) for p in bucket for name in p.huggingface()}
            for route in rounds:
                self._exchange(route, tensors, like)
            yield from tensors.items()

    def metrics(self) -> dict[str, float]:
        """Megabytes of the last pass, maximum over the ranks: received from other ranks, and held for one layer at most. Every rank must
        call."""
        received, buffer = over_world([self.received, self.buffer], self.mesh, "max")
        return {"refit/received_mb": received / 1e6, "refit/buffer_mb": buffer / 1e6}

    def _exchange(self, route: Route, tensors: dict[str, Tensor], like: Tensor) -> None:
        """Fill in a round's parts by one all-to-all, as bytes. Parts that stay on this rank are copied directly."""
        me, ranks = self.mesh.rank, range(self.mesh.world)
        sends, receives = ([moves.get(rank, []) if rank != me else [] for rank in ranks] for moves in route)
        for transfer in route.receives.get(me, []):
            _part(tensors[transfer.name], transfer).copy_(self._held(transfer))
        # what is passed on has been received in the round before
        parts = [_part(tensors[t.name], t) if t.relayed else self._held(t) for transfers in sends for t in transfers]
        outgoing = _join(parts, like)
        incoming = like.new_empty(sum(transfer.numel for transfers in receives for transfer in transfers))
        dist.all_to_all_single(_bytes(incoming), _bytes(outgoing), _sizes(receives, like), _sizes(sends, like))
        start = 0
        for transfer in itertools.chain(*receives):
            part = _part(tensors[transfer.name], transfer)
            part.copy_(incoming[start : start + transfer.numel].view_as(part))
            start += transfer.numel
        self.received += incoming.nbytes
        self.buffer = max(self.buffer, incoming.nbytes + outgoing.nbytes + sum(tensor.nbytes for tensor in tensors.values()))

    def _held(self, transfer: Transfer) -> Tensor:
        """A view of the transfer's part in this rank's shard."""
        shard = self.local[transfer.parameter].detach()
        rows = shard[transfer.at : transfer.at + transfer.rows[1] - transfer.rows[0]]
        if transfer.columns is None:
            return rows
        return rows[:, transfer.left : transfer.left + transfer.columns[1] - transfer.columns[0]]


def _ranks_per_host(mesh: Mesh) -> int:
    """Ranks per host, the fewest if hosts differ: a smaller node than there is costs some traffic, nothing else. Every rank must call."""
    hosts: list[str] = [""] * mesh.world
    dist.all_gather_object(hosts, socket.gethostname())
    return min(Counter(hosts).values())


def _part(tensor: Tensor, transfer: Transfer) -> Tensor:
    rows = tensor[transfer.rows[0] : transfer.rows[1]]
    return rows if transfer.columns is None else rows[:, transfer.columns[0] : transfer.columns[1]]


def _sizes(by_rank: list[list[Transfer]], like: Tensor) -> list[int]:
    """Bytes to or from each rank."""
    return [sum(transfer.numel for transfer in transfers) * like.element_size() for transfers in by_rank]


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
