"""One or more vLLM servers, in other processes or on other nodes, as one roll-out engine.

Rank 0 queries the servers in a separate thread, so that responses can be drawn while the ranks train. All ranks gather the weights; each
server receives them from one rank, so that several nodes send at once. If a server fails, its requests go to the others with the same
seeds; once it is back, even in the middle of a roll-out, it gets the current weights and its share of the requests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import aiohttp
import torch.distributed as dist

from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world
from megafork.recipe import RecipeError
from megafork.rollout.batch import TRIES, Batch, NoServer
from megafork.rollout.client import Limits, RequestRefused, Server, ServerLost, WrongSecret
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Ended, Engine, Request, Sampling, Weights
from megafork.rollout.guard import credentials
from megafork.rollout.transfer import Lane, buckets

_PATIENCE = timedelta(days=1)
"""Timeout of ranks that wait for rank 0, which enforces the real time limits."""
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ServerEngine(Engine):
    """The servers in `rollout.servers` as one engine. Every rank of the world constructs one; rank 0 has the completions."""

    number = 0
    engines = 1
    draws_in_background = True

    def __init__(self, config: EngineConfig, mesh: Mesh, weights: Weights, urls: Sequence[str], limits: Limits) -> None:
        """Wait for all servers. Raises RecipeError if one does not answer within `limits.server_s` or does not suit the recipe.

        `weights` must be re-iterable, each pass together on all ranks, since a server may come back at any time.
        """
        if iter(weights) is weights:
            raise TypeError("the weights can be iterated only once: a server that comes back later needs them again")
        self._config = config
        self._mesh = mesh
        self._weights = config.loaded(weights)
        self._limits = limits
        self.rank = mesh.rank
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._session = self._run(_open_session())
        self._servers = [Server(url, self._session, limits, fork_decoding=config.fork_decoding, entropies=config.entropies) for url in urls]
        # servers are spread over the ranks, and therefore over the nodes
        self._lanes = {
            n: Lane(server, mesh.device, limits.server_s)
            for n, server in enumerate(self._servers)
            if n * mesh.world // len(urls) == mesh.rank
        }
        self._up: set[int] = set()
        """Responsive servers with the current weights; rank 0's set is authoritative."""
        self._back: set[int] = set()
        """On rank 0: servers that are healthy again but do not have the weights yet."""
        self._failed: set[int] = set()
        """Servers that could not load the current weights: they stay out until the next refit."""
        self._version = -1
        self.bytes_sent = 0
        """Bytes sent by this rank since the last refit began."""
        self._from_rank_zero(lambda: self._run(self._check()))

    @property
    def serving(self) -> int:
        """Number of servers believed responsive and up to date; the same on every rank after a refit."""
        return len(self._up)

    def generate(self, requests: Sequence[Request], sampling: Sampling, ended: Ended | None = None) -> list[Completion]:
        """On rank 0, one completion per request, in order; on other ranks an empty list, whatever they pass.

        Rank 0 blocks until all requests are answered, and needs the other ranks' help when servers come back: call it in a thread, one
        call at a time, and pass its future to `attend`. Raises NoServer and RequestRefused.
        """
        if self.rank != 0:
            return []
        batch = Batch(requests, sampling, self._version, ended)
        self._run(self._answer(batch))
        return batch.completions

    def attend(self, work: Future[_T]) -> _T:
        """Wait for work that queries the servers, and meanwhile give returning servers the weights. Every rank must call with its own part.

        NoServer and RequestRefused from rank 0's part are raised on every rank; so is NoServer after `limits.server_s` without a server.
        """
        served = [time.monotonic()]
        while (back := self._from_rank_zero(lambda: self._watch(work, served))) is not None:
            if back:
                self._feed(back)
        return work.result()

    def refit(self, version: int) -> None:
        """Give the weights to every healthy server; returns once all ranks know which have them. Raises NoServer if none has.

        Running responses are suspended, their caches dropped, and resumed with the new weights.
        """
        self._version, self._failed = version, set()
        self.bytes_sent = 0
        for _ in range(TRIES):
            targets = self._from_rank_zero(lambda: self._run(self._healthy()))
            self._up &= set(targets)
            failed = self._feed(targets)
            if self._up:
                return
        raise NoServer(f"none of the servers in rollout.servers took weights {version}: {next(iter(failed.values()))}")

    def refit_metrics(self) -> dict[str, float]:
        """Megabytes sent by the busiest rank, and the number of servers that have the weights."""
        sent, serving = over_world([self.bytes_sent, self.serving], self._mesh, "max")
        return {"refit/sent_mb": sent / 1e6, "refit/servers": serving}

    def close(self) -> None:
        """Disconnect from the servers, which keep running. Every rank must call."""
        for lane in self._lanes.values():
            lane.close()
        self._run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    # ---- rank 0 and the others

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _from_rank_zero(self, find: Callable[[], _T]) -> _T:
        """Return rank 0's result, or raise its error, on every rank."""
        said: list[Any] = [None]
        if self.rank == 0:
            try:
                said = [find()]
            except (RecipeError, NoServer, RequestRefused) as error:
                said = [error]
        dist.broadcast_object_list(said, src=0, group=self._group)
        if isinstance(said[0], Exception):
            raise said[0]
        return said[0]

    def _watch(self, work: Future[Any], served: list[float]) -> list[int] | None:
        """On rank 0: the servers that have come back and need the weights, or None when the work is done."""
        if concurrent.futures.wait([work], self._limits.poll_s).done:
            if isinstance(error := work.exception(), (NoServer, RequestRefused)):
                raise error
            return None
        if self._up:
            served[0] = time.monotonic()
        elif time.monotonic() - served[0] > self._limits.server_s:
            raise self._none_left()
        return sorted(self._back - self._failed - self._up)  # the other thread may not know yet that one has its weights

    # ---- servers

    async def _check(self) -> None:
        """Check that every server answers and suits this run."""
        await asyncio.gather(*(self._check_one(server) for server in self._servers))

    async def _check_one(self, server: Server) -> None:
        mend = "start it by `python -m megafork.rollout.serve RECIPE --port PORT`"
        try:
            await asyncio.wait_for(server.until_healthy(), self._limits.server_s)
            await server.workers()
            longest = await server.longest_sequence()
        except TimeoutError:
            raise RecipeError(f"rollout.servers: nothing answers at {server.url} after {self._limits.server_s:g} s; {mend}") from None
        except WrongSecret as error:
            raise RecipeError(f"rollout.servers: {error}: give both the same") from None
        except (ServerLost, RequestRefused) as error:
            raise RecipeError(f"rollout.servers: {error}; {mend}") from error
        if longest < (needed := self._config.longest_sequence):
            raise RecipeError(f"rollout.servers: {server.url} takes {longest} tokens, the recipe needs {needed}; {mend}")

    async def _healthy(self) -> list[int]:
        """The servers that are healthy now; waits until there is at least one."""
        until = time.monotonic() + self._limits.server_s
        while True:
            well = await asyncio.gather(*(server.healthy() for server in self._servers))
            if any(well):
                return [n for n, healthy in enumerate(well) if healthy]
            if time.monotonic() > until:
                raise self._none_left()
            await asyncio.sleep(self._limits.poll_s)

    def _none_left(self) -> NoServer:
        return NoServer(f"none of the {len(self._servers)} servers of rollout.servers answered for {self._limits.server_s:g} s")

    # ---- weights

    def _feed(self, targets: Sequence[int]) -> dict[int, str]:
        """Give these servers the current weights. Every rank must call: all gather each tensor, even if servers fail.

        Returns, on every rank, the servers that failed and why.
        """
        lost: dict[int, str] = {}
        lanes = {n: lane for n, lane in self._lanes.items() if n in targets}

        async def attempt(step: Callable[[Lane], Awaitable[None]], n: int) -> None:
            try:
                await step(lanes[n])
            except (ServerLost, RequestRefused) as error:
                lost[n] = str(error)
                lanes[n].close()

        async def each(step: Callable[[Lane], Awaitable[None]]) -> None:
            await asyncio.gather(*(attempt(step, n) for n in lanes if n not in lost))

        self._run(each(lambda lane: lane.begin()))
        for bucket in buckets(self._weights):
            self._run(each(lambda lane, bucket=bucket: lane.send(bucket)))  # type: ignore[misc]
            self.bytes_sent += sum(tensor.nbytes for _, tensor in bucket) * (len(lanes) - len(lost))
        self._run(each(lambda lane: lane.end(self._version)))
        every: list[dict[int, str]] = [{} for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(every, lost, group=self._group)
        failed = {n: reason for part in every for n, reason in part.items()}
        self._failed |= set(failed)
        self._up = (self._up | set(targets)) - set(failed)
        for reason in failed.values() if self.rank == 0 else ():
            _log.warning("left without weights %d: %s", self._version, reason)
        return failed

    # ---- requests

    async def _answer(self, batch: Batch) -> None:
        """On rank 0: have every request answered by the servers that are up at the time."""
        serving: dict[int, asyncio.Task[None]] = {}
        returning: dict[int, asyncio.Task[None]] = {}
        finished = asyncio.create_task(batch.finished.wait())
        try:
            while not finished.done():
                self.progress(lambda: f"{batch.left:,} responses to finish")
                await self._assign(batch, serving, returning)
                waiting = [task for task in (finished, *serving.values(), *returning.values()) if not task.done()]
                await asyncio.wait(waiting, timeout=self._limits.poll_s, return_when=asyncio.FIRST_COMPLETED)
                for n in [n for n, task in serving.items() if task.done()]:
                    try:
                        await serving.pop(n)
                    except ServerLost as error:
                        _log.warning("taken out: %s", error)
                        self._up.discard(n)
                self._back = {n for n, task in returning.items() if task.done()}
        finally:
            self._back = set()
            await _cancel([finished, *serving.values(), *returning.values()])

    async def _assign(self, batch: Batch, serving: dict[int, asyncio.Task[None]], returning: dict[int, asyncio.Task[None]]) -> None:
        """Start serving on every server that is up, and wait for the others."""
        for n, server in enumerate(self._servers):
            if n in self._up:
                if n in returning:
                    await _cancel([returning.pop(n)])
                if n not in serving:
                    serving[n] = asyncio.create_task(self._serve(server, batch))
            else:
                if n in serving:  # it missed the last refit
                    await _cancel([serving.pop(n)])
                if n not in returning:
                    returning[n] = asyncio.create_task(server.until_healthy())

    async def _serve(self, server: Server, batch: Batch) -> None:
        """Keep requests in flight at one server until cancelled. On ServerLost, its requests wait for another server."""

        async def ask() -> None:
            while True:
                await batch.answer_next(server)

        tasks = [asyncio.create_task(ask()) for _ in range(min(self._limits.in_flight, len(batch.requests)))]
        tasks.append(asyncio.create_task(server.while_healthy()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _cancel(tasks)


async def _open_session() -> aiohttp.ClientSession:
    # One connection per request: the server may close an idle one while this loop stands still, which would look like a lost server.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), headers=credentials())


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
