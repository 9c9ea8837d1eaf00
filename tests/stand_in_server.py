"""A process with the routes of vLLM's server but no model: its answers depend on the request's seed and the weights it was sent, and it can
be told to die or hang at a given request. It starts instantly; vLLM's takes most of a minute."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from aiohttp import web
from torch.distributed import TCPStore

from megafork.parallel.meeting import signed
from megafork.rollout.background import Background
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.rollout.server import ServerEngine
from megafork.rollout.transfer import address_towards, broadcast, gloo_group


@dataclass(frozen=True)
class Habits:
    """What a server is like."""

    response_s: float = 0.02
    longest: int = 4096
    raw_log_probs: bool = False
    fork_decoding: bool = True
    entropies: bool = True
    refuses: bool = False
    """Every roll-out request."""
    page: bool = False
    """Is of something else, and answers with a page."""
    secret: str = ""
    """What every route asks for."""
    signal_at: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Route -> (its n-th call, from 1, the signal that the server then sends itself)."""


def answer(seed: int, version: str, weights: float) -> dict[str, Any]:
    """Tokens and log-probs of a request."""
    tokens = [seed % 97, int(weights) % 89, 3]
    return {
        "token_ids": tokens,
        "finish_reason": "stop",
        "logprobs": {"content": [_said(token, -token / 7, token / 11) for token in tokens]},
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
    }


def _said(token: int, log_prob: float, entropy: float) -> dict[str, Any]:
    own = {"token_id": token, "logprob": log_prob, "rank": 1}
    return {**own, "top_logprobs": [own, {"token_id": -1, "logprob": entropy, "rank": 2}]}


class StandIn:
    """The process. `keep` starts it again, with plain habits, whenever it dies; leaving the `with` block ends it."""

    def __init__(self, habits: Habits | None = None, *, keep: bool = False, up: bool = True) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._keep = keep
        self._over = threading.Event()
        if up:
            self._start(habits or Habits())

    def _start(self, habits: Habits) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=(self.port, habits))
        self._process.start()
        while self._process.is_alive():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                break
            time.sleep(0.01)
        if self._keep:
            threading.Thread(target=self._start_again, args=(self._process,), daemon=True).start()

    def _start_again(self, process: Any) -> None:
        process.join()
        if not self._over.is_set():
            self._start(Habits())

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/stats", timeout=5) as reply:
            return dict(json.load(reply))

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.join()


class _Routes:
    def __init__(self, habits: Habits) -> None:
        self.habits = habits
        self.calls: dict[str, int] = {}
        self.version = "default"
        self.weights: dict[str, float] = {}
        self.updating = self.paused = False
        self.running = self.peak = 0
        self.answered: list[int] = []
        self.group: Any = None

    @web.middleware
    async def count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.habits.secret and request.headers.get("Authorization") != f"Bearer {self.habits.secret}":
            return web.Response(status=401, text="who are you?")
        self.calls[request.path] = number = self.calls.get(request.path, 0) + 1
        at, sign = self.habits.signal_at.get(request.path, (0, 0))
        if number == at:
            os.kill(os.getpid(), sign)
        return await handler(request)

    async def fine(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": self.habits.longest}]})

    async def workers(self, _: web.Request) -> web.Response:
        return web.Response(text="<html>Welcome</html>") if self.habits.page else web.json_response({"world_size": 1})

    async def weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response({"answered": self.answered, "peak": self.peak, "version": self.version, "calls": self.calls})

    async def state(self, _: web.Request) -> web.Response:
        return web.json_response({"results": [{"open": self.updating, "problem": None}]})

    async def join(self, request: web.Request) -> web.Response:
        info = (await request.json())["init_info"]

        def meet() -> Any:
            self.store = signed(TCPStore(info["address"], info["port"], info["world_size"]))
            return gloo_group(self.store, 1, info["world_size"], address_towards(info["address"], info["port"]), info["limit_s"])

        self.group = await asyncio.to_thread(meet)
        return web.json_response({})

    async def pause(self, _: web.Request) -> web.Response:
        self.paused = True
        return web.json_response({})

    async def start(self, _: web.Request) -> web.Response:
        if self.updating:
            return web.Response(status=500, text="a weight update is already active")
        self.updating = True
        return web.json_response({})

    async def update(self, request: web.Request) -> web.Response:
        info = (await request.json())["update_info"]
        tensors = [torch.empty(shape, dtype=getattr(torch, d)) for d, shape in zip(info["dtype_names"], info["shapes"], strict=True)]
        if self.group is None:
            return web.Response(status=500, text="no group")
        await asyncio.to_thread(broadcast, self.group, tensors)
        self.weights |= {name: float(tensor.sum()) for name, tensor in zip(info["names"], tensors, strict=True)}
        return web.json_response({})

    async def finish(self, request: web.Request) -> web.Response:
        if not self.updating:
            return web.Response(status=500, text="no weight update is active")
        self.updating = False
        if request.can_read_body:
            self.version = (await request.json())["weight_version"]
        return web.json_response({})

    async def resume(self, _: web.Request) -> web.Response:
        self.paused = False
        return web.json_response({})

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sampling = body["sampling_params"]
        if "seed" not in sampling:  # the look at what log-probs are
            choice = answer(0, self.version, 0.0) | {"token_ids": [1]}
            certain = self.habits.fork_decoding if "extra_args" in sampling else not self.habits.raw_log_probs
            said = _said(1, 0.0 if certain else -2.0, 0.5)
            if not self.habits.entropies or sampling["logprobs"] < 2:
                said["top_logprobs"].pop()
            choice["logprobs"]["content"] = [said]
            return web.json_response({"choices": [choice]})
        if self.habits.refuses:
            return web.Response(status=400, text="the prompt is too long")
        assert not (self.paused or self.updating), "asked in the middle of an update"
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(self.habits.response_s)
        self.running -= 1
        self.answered.append(sampling["seed"])
        return web.json_response({"choices": [answer(sampling["seed"], self.version, sum(self.weights.values()))]})


def _serve(port: int, habits: Habits) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    routes = _Routes(habits)
    app = web.Application(middlewares=[routes.count])
    app.router.add_get("/health", routes.fine)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/get_world_size", routes.workers)
    app.router.add_get("/weight_info", routes.weight_info)
    app.router.add_get("/stats", routes.stats)
    app.router.add_post("/collective_rpc", routes.state)
    app.router.add_post("/init_weight_transfer_engine", routes.join)
    app.router.add_post("/pause", routes.pause)
    app.router.add_post("/start_weight_update", routes.start)
    app.router.add_post("/update_weights", routes.update)
    app.router.add_post("/finish_weight_update", routes.finish)
    app.router.add_post("/reset_prefix_cache", routes.fine)
    app.router.add_post("/resume", routes.resume)
    app.router.add_post("/inference/v1/generate", routes.generate)
    web.run_app(app, host="127.0.0.1", port=port, print=None, handle_signals=False, access_log=None)


def complete(engine: ServerEngine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
    """As the trainer asks: in a thread, which every rank attends to."""
    ended: dict[int, Completion] = {}
    completions = engine.attend(Background().begin(partial(engine.generate, requests, sampling, ended.__setitem__)))
    assert ended == dict(enumerate(completions)), "each is told of as it ends"
    return completions
