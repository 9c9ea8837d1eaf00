"""Sends weights from a training rank to vLLM servers in other processes, using vLLM's weight-transfer API.

A link is the trainer's end of a process group whose other members are one server's workers. On the CPU it uses gloo, and the workers'
end is ours (`receiver.py`); on CUDA it uses NCCL, and the workers' end is vLLM's own. Each server has its own group, so that a server
that dies does not disturb the others.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store

from megafork.parallel.meeting import listen, signed
from megafork.rollout.client import Server, ServerLost

Bucket = list[tuple[str, Tensor]]


def buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
    """Group tensors that are sent together: each layer whole, as vLLM fuses q, k and v, and gate and up; other tensors singly."""
    for _, members in itertools.groupby(weights, key=lambda member: _layer(member[0])):
        yield list(members)


def _layer(name: str) -> str:
    layer = re.match(r".*?\.\d+\.", name)
    return layer.group() if layer else name


def describe(bucket: Bucket) -> dict[str, Any]:
    """The update info of vLLM's API, which tells a worker what to expect."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


class Link(Protocol):
    """The trainer's end of a group. `join` and `send` block, and raise RuntimeError if a worker is gone or too slow."""

    init_info: dict[str, Any]
    """What the server's workers need in order to join."""

    def join(self) -> None: ...

    def send(self, bucket: Bucket) -> None: ...

    def close(self) -> None:
        """Close the link. May be called while another thread is blocked in `send`, which then ends."""
        ...


class GlooLink:
    def __init__(self, address: str, workers: int, limit_s: float) -> None:
        self._address = address
        self._limit_s = limit_s
        self._world = workers + 1
        limit = timedelta(seconds=limit_s)
        listening = listen(address, 0, self._world, limit)
        self._store = signed(listening)
        self._group: Any = None
        self.init_info = {"address": address, "port": listening.port, "world_size": self._world, "limit_s": limit_s}

    def join(self) -> None:
        self._group = gloo_group(self._store, 0, self._world, self._address, self._limit_s)

    def send(self, bucket: Bucket) -> None:
        broadcast(self._group, [tensor for _, tensor in bucket])

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()


class NcclLink:
    """Link to vLLM's own NCCL engine, written for its API of version 0.32.

    NCCL's group id travels over HTTP, which requires the secret. vLLM's alternative is a store that unpickles whatever anyone writes.
    """

    def __init__(self, workers: int, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self._device = device
        self._world = workers + 1
        self._id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
        self._group: Any = None
        self.init_info = {
            "nccl_unique_id_b64": base64.b64encode(self._id).decode(),
            "world_size": self._world,
            "rank_offset": 1,
            "packed": True,
        }

    def join(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        with torch.cuda.device(self._device):  # a new thread starts on device 0
            self._group = uid_init_process_group(self._id, rank=0, world_size=self._world, device=self._device.index)

    def send(self, bucket: Bucket) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # the bucket was gathered on a different stream from those that send it
            packed_nccl_broadcast_producer(iter(bucket), self._group, src=0, post_iter_func=lambda member: member[1])

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()


def gloo_group(store: Store, rank: int, world: int, address: str, limit_s: float) -> Any:
    """A process group apart from the default one; every member must call. `address`: where the others reach this member."""
    gloo: Any = ProcessGroupGloo  # torch's stubs lack its options and collectives
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=limit_s)
    return gloo(store, rank, world, options)


def broadcast(group: Any, tensors: list[Tensor]) -> None:
    """Broadcast tensors in place from member 0 of a gloo group; any dtype, contiguous, and of the same shapes on every member."""
    works = [group.broadcast(tensor.detach().contiguous().view(-1).view(torch.uint8), 0) for tensor in tensors]
    for work in works:
        work.wait()


def address_towards(host: str, port: int) -> str:
    """The local address used to connect to another host, where that host can reach this one."""
    with socket.create_connection((host, port), timeout=10.0) as probe:
        return str(probe.getsockname()[0])


class Lane:
    """Sends weights to one server. The link is kept between updates; it is reopened after a failure, or if the server's weights are not
    the last ones sent, which means that the server was restarted. Coroutines raise ServerLost; call `close` after that."""

    def __init__(self, server: Server, device: torch.device, limit_s: float) -> None:
        self.server = server
        self._device = device
        self._limit_s = limit_s
        self._link: Link | None = None
        self._version: int | None = None

    async def begin(self) -> None:
        if self._link is not None and await self.server.weight_version() != str(self._version):
            self.close()
        await self.server.start_update(keep=self._link is not None)
        if self._link is None:
            workers = await self.server.workers()
            self._link = await asyncio.to_thread(self._open, workers)
            await self._together(self._link.join, self.server.join(self._link.init_info))

    async def send(self, bucket: Bucket) -> None:
        assert self._link is not None
        link = self._link
        await self._together(lambda: link.send(bucket), self.server.receive(describe(bucket)))

    async def end(self, version: int) -> None:
        await self.server.finish_update(version)
        self._version = version

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _open(self, workers: int) -> Link:
        address = urlsplit(self.server.url)
        try:
            here = address_towards(address.hostname or "", address.port or 80)
        except OSError as error:
            raise ServerLost(f"{self.server.url}: {error}") from error
        return NcclLink(workers, self._device) if self._device.type == "cuda" else GlooLink(here, workers, self._limit_s)

    async def _together(self, work: Callable[[], None], asking: Awaitable[None]) -> None:
        """Run both ends of a collective: ours in a thread, the server's over HTTP. If one fails, the other is not awaited."""
        tasks = [asyncio.ensure_future(asking), asyncio.ensure_future(asyncio.to_thread(work))]
        try:
            done, late = await asyncio.wait(tasks, timeout=self._limit_s, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            if late:
                raise ServerLost(f"{self.server.url} took no weights in {self._limit_s:g} s")
        except RuntimeError as error:
            raise ServerLost(f"{self.server.url}: {error}") from error
        finally:
            for task in tasks:
                task.cancel()
