"""Roll-outs on remote servers: what happens to requests and weights when servers die, hang, come back, or are misconfigured.

The servers here are stand-ins that start instantly (`stand_in_server.py`); `test_vllm_server.py` tests vLLM's own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from command import forked_python
from ranks import on_ranks
from stand_in_server import Habits, StandIn, answer, complete
from tiny import recipe
from torch import Tensor

from megafork.parallel.mesh import build_mesh
from megafork.recipe import RecipeError
from megafork.rollout.batch import NoServer
from megafork.rollout.client import Limits, RequestRefused
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.rollout.guard import Guard
from megafork.rollout.serve import keep_running
from megafork.rollout.server import ServerEngine
from megafork.secret import NAME

GENERATE = "/inference/v1/generate"
REQUESTS = [Request([1, 2, 3], seed) for seed in range(1000, 1060)]
LIMITS = Limits(in_flight=4, request_s=30.0, server_s=30.0, health_s=10.0, connect_s=10.0, poll_s=0.1)
"""For servers that answer or are gone: however busy the machine is, none is taken for hanging."""


class Weights:
    """Whole tensors that all ranks make together: with one rank missing it would not end."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
            tensor = torch.full((10, 7), self.value / dist.get_world_size())
            dist.all_reduce(tensor)
            yield name, tensor


def total(value: float) -> float:
    return 3 * 70 * value


ENTROPIES = "returns no entropies, which forks.entropy_from=rollout needs"


def roll_outs(
    urls: list[str], limits: Limits, versions: list[int], *, entropies: bool = False, **rollout: Any
) -> list[list[Completion]] | Exception:
    """On every rank: refit to each version and ask everything."""
    forks = {"entropy_from": "rollout" if entropies else "old"}
    spec = recipe(Path("no model is read"), rollout={"servers": urls, **rollout}, forks=forks)
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    try:
        weights = Weights(0.0)
        engine = ServerEngine(EngineConfig.of(spec), mesh, weights, urls, limits)
        answers = []
        for version in versions:
            weights.value = float(version)
            engine.refit(version)
            answers.append(complete(engine, REQUESTS, Sampling(max_tokens=8, entropies=entropies)))
        engine.close()
        return answers
    except (NoServer, RequestRefused, RecipeError) as error:
        return error


def expected(version: int, *, entropies: bool = False) -> list[Completion]:
    answers = [answer(request.seed, str(version), total(version)) for request in REQUESTS]
    return [
        Completion(
            a["token_ids"],
            [t["logprob"] for t in a["logprobs"]["content"]],
            False,
            [version] * 3,
            [t["top_logprobs"][1]["logprob"] for t in a["logprobs"]["content"]] if entropies else [],
        )
        for a in answers
    ]


def test_each_request_is_answered_once_in_order_and_few_at_a_time() -> None:
    with StandIn() as first, StandIn() as second:
        ranks = on_ranks(2, roll_outs, [first.url, second.url], LIMITS, [1, 2, 3])
        assert ranks[0] == [expected(1), expected(2), expected(3)]
        assert ranks[1] == [[], [], []]
        stats = [first.stats(), second.stats()]
    assert sorted(seed for s in stats for seed in s["answered"]) == sorted(3 * [r.seed for r in REQUESTS])
    assert all(len(s["answered"]) > 60 and s["peak"] == LIMITS.in_flight for s in stats), "the servers share the work"
    assert all(s["calls"]["/init_weight_transfer_engine"] == 1 for s in stats), "one link serves all updates"


def test_entropies_come_with_their_tokens() -> None:
    with StandIn() as server:
        answers = on_ranks(1, partial(roll_outs, entropies=True), [server.url], LIMITS, [1])[0]
    assert answers == [expected(1, entropies=True)]
    assert answers[0][0].entropies and answers != [expected(1)]


def test_a_server_that_is_killed_in_mid_roll_out_costs_nothing() -> None:
    habits = Habits(signal_at={GENERATE: (12, signal.SIGKILL)})
    with StandIn(habits) as dies, StandIn() as lives:
        answers = on_ranks(2, roll_outs, [dies.url, lives.url], LIMITS, [1, 2])[0]
        assert answers == [expected(1), expected(2)]
        assert len(lives.stats()["answered"]) > 60 + 60 - 12


def test_a_server_that_comes_back_gets_the_current_weights_and_work() -> None:
    habits = Habits(signal_at={GENERATE: (12, signal.SIGKILL)})
    with StandIn(habits, keep=True) as dies, StandIn(Habits(response_s=0.2)) as lives:
        answers = on_ranks(2, roll_outs, [dies.url, lives.url], LIMITS, [1])[0]
        assert answers == [expected(1)]
        stats = dies.stats()
        assert stats["version"] == "1" and len(stats["answered"]) > 10, "within the same roll-out"
        assert stats["calls"]["/start_weight_update"] == 1, "one update is enough"
        assert sorted(stats["answered"] + lives.stats()["answered"]) == sorted(set(stats["answered"] + lives.stats()["answered"]))


def test_a_server_that_was_started_again_between_two_steps_is_noticed() -> None:
    """By its weights: it looks well, and its link is dead."""
    habits = Habits(signal_at={GENERATE: (62, signal.SIGKILL)})  # 60 requests and the look at log-probs; the next is a new step's look
    with StandIn(habits, keep=True) as server:
        assert on_ranks(2, roll_outs, [server.url], LIMITS, [1, 2, 3])[0] == [expected(1), expected(2), expected(3)]


def test_without_any_server_the_run_waits_for_one() -> None:
    habits = Habits(signal_at={GENERATE: (12, signal.SIGKILL)})
    with StandIn(habits, keep=True) as first, StandIn(habits, keep=True) as second:
        assert on_ranks(2, roll_outs, [first.url, second.url], LIMITS, [1])[0] == [expected(1)]


def test_without_any_server_for_too_long_every_rank_says_so() -> None:
    limits = Limits(in_flight=4, server_s=1.0, health_s=0.5, poll_s=0.1)
    with StandIn(Habits(signal_at={GENERATE: (12, signal.SIGKILL)})) as server:
        for error in on_ranks(2, roll_outs, [server.url], limits, [1]):
            assert isinstance(error, NoServer) and "none of the 1 servers" in str(error) and "1 s" in str(error)


def test_a_server_that_hangs_in_mid_roll_out_is_given_up() -> None:
    limits = Limits(in_flight=4, request_s=30.0, server_s=3.0, health_s=1.0, connect_s=3.0, poll_s=0.1)
    with StandIn(Habits(signal_at={GENERATE: (12, signal.SIGSTOP)})) as hangs, StandIn() as lives:
        assert on_ranks(2, roll_outs, [hangs.url, lives.url], limits, [1, 2])[0] == [expected(1), expected(2)]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("route", ["/init_weight_transfer_engine", "/update_weights", "/finish_weight_update"])
def test_a_server_that_fails_in_a_refit_does_not_hold_it_up(route: str, sign: int) -> None:
    limits = Limits(in_flight=4, server_s=3.0, health_s=1.0, connect_s=1.0, poll_s=0.1)
    with StandIn(Habits(signal_at={route: (1, sign)})) as fails, StandIn() as lives:
        assert on_ranks(2, roll_outs, [fails.url, lives.url], limits, [1, 2])[0] == [expected(1), expected(2)]
        assert lives.stats()["version"] == "2"


def test_an_update_that_a_dead_trainer_left_open_is_closed() -> None:
    with StandIn() as server:
        for route in ("/pause", "/start_weight_update"):
            with urllib.request.urlopen(urllib.request.Request(server.url + route, method="POST"), timeout=5):
                pass
        assert on_ranks(1, roll_outs, [server.url], LIMITS, [5])[0] == [expected(5)]


def test_a_request_that_no_server_answers_in_time_ends_the_run() -> None:
    limits = Limits(in_flight=64, request_s=0.2, server_s=5.0, poll_s=0.05)
    with StandIn(Habits(response_s=10.0)) as first, StandIn(Habits(response_s=10.0)) as second:
        for error in on_ranks(2, roll_outs, [first.url, second.url], limits, [1]):
            assert isinstance(error, NoServer) and "tried 5 times" in str(error) and "no answer in 0.2 s" in str(error)


def test_a_refused_request_is_not_asked_again() -> None:
    with StandIn(Habits(refuses=True)) as server:
        for error in on_ranks(2, roll_outs, [server.url], LIMITS, [1]):
            assert isinstance(error, RequestRefused) and "the prompt is too long" in str(error)
        assert server.stats()["calls"][GENERATE] <= 1 + LIMITS.in_flight


@pytest.mark.parametrize(
    ("habits", "kind", "words"),
    [
        (None, RecipeError, "nothing answers at http"),
        (Habits(page=True), RecipeError, "/get_world_size is not a roll-out server's: it answers '<html>Welcome</html>'; start it by"),
        (Habits(longest=63), RecipeError, "takes 63 tokens, the recipe needs 64"),
        (Habits(raw_log_probs=True), NoServer, "--logprobs-mode processed_logprobs"),
        (Habits(fork_decoding=False), NoServer, "does not know rollout.fork_temperature"),
        (Habits(entropies=False), NoServer, ENTROPIES),
    ],
    ids=["absent", "something else", "short", "raw log-probs", "no fork-aware decoding", "no entropies"],
)
def test_a_server_that_is_not_set_up_as_the_run_needs_is_named(habits: Habits | None, kind: type[Exception], words: str) -> None:
    limits = Limits(in_flight=4, server_s=3.0, poll_s=0.1)
    with StandIn(habits, up=habits is not None) as server:
        ask = partial(roll_outs, entropies=True) if words == ENTROPIES else partial(roll_outs, fork_temperature=(0.7, 1.3, 0.5))
        for error in on_ranks(2, ask, [server.url], limits, [1]):
            assert isinstance(error, kind) and words in str(error) and server.url in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("mine", ["", "a-secret-of-another-job"])
def test_a_server_of_another_secret_is_named_at_once(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, mine)
    with StandIn(Habits(secret="the-secret-of-this-job")) as server:
        for error in on_ranks(2, roll_outs, [server.url], LIMITS, [1]):
            end = "not the one of this process" if mine else "and this process has none"
            said = f"rollout.servers: {server.url} asks for the {NAME} that it was started with, {end}: give both the same"
            assert isinstance(error, RecipeError) and str(error) == said


def test_servers_of_the_same_secret_take_weights_by_a_signed_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "the-secret-of-this-job")
    with StandIn(Habits(secret="the-secret-of-this-job")) as server:
        assert on_ranks(2, roll_outs, [server.url], LIMITS, [1, 2])[0] == [expected(1), expected(2)]


def guarded(scope: dict[str, Any]) -> list[Any]:
    """What a guarded application sends back, and whether it was reached."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("reached")

    async def send(message: Any) -> None:
        sent.append(message.get("status", message["type"]))

    asyncio.run(Guard(app)({"headers": [], **scope}, None, send))  # type: ignore[arg-type]
    return sent


def test_every_route_asks_for_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    assert guarded({"type": "http"}) == ["reached"], "without one, which is refused but on the loopback"
    monkeypatch.setenv(NAME, "the-secret-of-this-job")
    right = (b"authorization", b"Bearer the-secret-of-this-job")
    for method in ("GET", "POST", "OPTIONS"):
        assert guarded({"type": "http", "method": method, "headers": [right]}) == ["reached"]
        wrong: list[list[tuple[bytes, bytes]]] = [[], [right, right], [(b"cookie", right[1])]]
        wrong += [[(b"authorization", value)] for value in (b"", b"Bearer another", b"the-secret-of-this-job")]
        for headers in wrong:
            assert guarded({"type": "http", "method": method, "headers": headers}) == [401, "http.response.body"]
    assert guarded({"type": "websocket"}) == ["websocket.close"]
    assert guarded({"type": "lifespan"}) == ["reached"]


def test_a_server_that_others_reach_needs_a_secret(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    for host in ("0.0.0.0", "::", "192.0.2.77"):
        words = [sys.executable, "-m", "megafork.rollout.serve", "recipe.yaml", "--host", host]
        with forked_python(words, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert said.startswith(f"megafork: --host is {host!r}, which other machines reach, and {NAME} is not set: export")


def test_a_server_is_not_started_again_and_again_where_another_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [sys.executable, "-m", "megafork.rollout.serve", "recipe.yaml", "--port", str(port)]
        with forked_python(words, cwd=tmp_path, env=None, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (
        2,
        f"megafork: --port is {port}: another process listens there; end it, or choose another port\n",
    )


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_server_ends_with_its_keeper(number: signal.Signals, tmp_path: Path) -> None:
    """It has a session of its own, so it would outlive a terminal that is closed, and keep the GPU."""
    begun = tmp_path / "begun"
    program = f"import os, time; open({str(begun)!r}, 'x').write(str(os.getpid())); time.sleep(60)"
    keeper = multiprocessing.get_context("fork").Process(target=keep_running, args=([sys.executable, "-c", program], "127.0.0.1", 9))
    keeper.start()
    while not (begun.exists() and begun.read_text()):
        time.sleep(0.05)
    assert keeper.pid is not None
    os.kill(keeper.pid, number)
    keeper.join()
    assert keeper.exitcode == 0 and not psutil.pid_exists(int(begun.read_text()))


def test_weights_that_can_be_read_only_once_are_refused() -> None:
    assert on_ranks(1, engine_with_a_stream) == ["the weights can be iterated only once: a server that comes back later needs them again"]


def engine_with_a_stream() -> str:
    spec = recipe(Path("no model is read"))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    with pytest.raises(TypeError) as refused:
        ServerEngine(EngineConfig.of(spec), mesh, iter(Weights(1.0)), ["http://127.0.0.1:9"], LIMITS)
    return str(refused.value)
