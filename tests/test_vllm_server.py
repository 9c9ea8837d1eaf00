"""vLLM's own servers: what they answer after a refit, after a kill, and after mistakes that vLLM silently accepts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from command import forked_python, run_on_forks, start_megafork
from entropies import check_entropies
from ranks import free_port, import_vllm_server, on_ranks
from stand_in_server import complete
from task import make_task, write_recipe
from tiny import Chosen, recipe
from torch import Tensor
from vllm_engines import LONG, PROMPTS, REQUESTS, SAMPLING, UPDATES, Answers, assert_equal, fresh, models, tensors

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Recipe
from megafork.rollout.background import Background
from megafork.rollout.batch import NoServer
from megafork.rollout.client import Limits
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Request, Sampling, Weights, request_seed
from megafork.rollout.guard import credentials
from megafork.rollout.server import ServerEngine
from megafork.secret import NAME, is_loopback
from megafork.shape import read_shape
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import export_policy, load_policy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
T = TypeVar("T")
FORKS = (0.7, 1.3, 4.2)
"""Fork-aware decoding, in whole runs only: about half of the tokens on each side."""
LIMITS = Limits(in_flight=16, request_s=60.0, server_s=400.0, poll_s=0.2)


def spec_of(folder: Path, **sections: Any) -> Recipe:
    return recipe(folder, **{"data": {"max_prompt_length": LONG}, **sections})


class Exported:
    """A policy's weights as the trainer hands them out: gathered over its ranks, again at every pass."""

    def __init__(self, spec: Recipe, folders: list[Path]) -> None:
        self.mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
        self.shape = read_shape(folders[0])
        self.sources = [HuggingFaceWeights(folder) for folder in folders]
        self.chunks = build_policy(self.shape, PolicyConfig.of(spec), self.mesh)

    def become(self, model: int) -> Exported:
        """The same, with the weights of that model."""
        load_policy(self.chunks, self.sources[model], self.shape, self.mesh)
        return self

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return export_policy(self.chunks, self.shape, self.mesh)


@contextlib.contextmanager
def vllm_servers(specs: list[Recipe], folder: Path) -> Iterator[list[tuple[str, subprocess.Popen[bytes]]]]:
    """(Address, process that keeps the server running) each. They take seconds to come up; nobody waits here."""
    import_vllm_server()
    started = []
    try:
        for n, spec in enumerate(specs):
            file, port = folder / f"server_{n}.yaml", free_port()
            file.write_text(spec.to_yaml())
            words = [sys.executable, "-m", "megafork.rollout.serve", str(file), "--port", str(port)]
            log = (folder / f"server_{n}.log").open("wb")
            process = forked_python(words, stdout=log, stderr=subprocess.STDOUT)
            started.append((f"http://127.0.0.1:{port}", process))
        yield started
    finally:
        families = [[psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] for _, process in started]
        for _, process in started:
            process.terminate()
        for (_, process), family in zip(started, families, strict=True):
            process.wait(60)
            assert psutil.wait_procs(family, timeout=10)[1] == [], "a server leaves nothing behind"


def test_two_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One story, for servers are slow to start: five updates, the mistakes, strangers, and a kill. The servers' engines are of TP 1 and
    TP 2, the trainer's model is tied and of TP 2."""
    monkeypatch.setenv(NAME, "the-secret-of-this-job")
    folders = models(tmp_path)
    shared_keys = {"kv_cache_mb": 32, "max_running": 16, "fork_temperature": FORKS}
    specs = [spec_of(folders[0], rollout={"tp": tp, **shared_keys}) for tp in (1, 2)]
    with vllm_servers(specs, tmp_path) as servers:
        want = on_ranks(1, fresh, folders, free_port(), engines=True)[0]
        urls = [url for url, _ in servers]

        def trainer(*urls: str) -> Recipe:
            return spec_of(folders[0], parallel={"tp": 2}, rollout={"servers": list(urls)}, forks={"entropy_from": "rollout"})

        for url in urls:
            got = on_ranks(2, after_updates, trainer(url), folders)[0]
            for answers, model in zip(got, UPDATES, strict=True):
                assert_equal(answers, want[model])
            assert got[0] == got[2]
        for answers in on_ranks(2, after_mistakes, trainer(*urls), folders)[0]:
            assert_equal(answers, want[1])
        on_ranks(2, through_an_update, trainer(*urls), folders)
        for url, keeper in servers:
            closed_to_strangers(url, keeper)
        on_ranks(2, through_a_kill, trainer(*urls), folders, server_of(servers[0][1]).pid, timeout_s=400)
        whole_runs(tmp_path, servers)


def closed_to_strangers(url: str, keeper: subprocess.Popen[bytes]) -> None:
    """No route answers without the secret, and nothing of a server listens but on the loopback."""
    for route in ("health", "v1/models", "metrics", "get_world_size", "openapi.json", "no/such/route"):
        for data in (None, b"{}"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{url}/{route}", data=data, timeout=30)
    for route in ("pause", "collective_rpc", "init_weight_transfer_engine", "update_weights", "inference/v1/generate"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/{route}", data=b"{}", timeout=30)
    for process in psutil.Process(keeper.pid).children(recursive=True):
        listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert all(is_loopback(ip) for ip in listening), (process.cmdline(), listening)


def server_of(keeper: subprocess.Popen[bytes]) -> psutil.Process:
    return psutil.Process(keeper.pid).children()[0]


def engine_of(spec: Recipe, mesh: Mesh, weights: Weights) -> ServerEngine:
    return ServerEngine(EngineConfig.of(spec), mesh, weights, spec.rollout.servers, LIMITS)


def everything(engine: ServerEngine) -> list[Answers]:
    return [[(c.tokens, c.log_probs) for c in complete(engine, REQUESTS, sampling)] for sampling in SAMPLING]


def after_updates(spec: Recipe, folders: list[Path]) -> list[list[Answers]]:
    policy = Exported(spec, folders)
    engine = engine_of(spec, policy.mesh, policy)
    answers = []
    for version, model in enumerate(UPDATES):
        policy.become(model)
        engine.refit(version)
        answers.append(everything(engine))
    with_entropies = complete(engine, REQUESTS, replace(SAMPLING[1], entropies=True))
    if engine.rank == 0:
        assert [c.tokens for c in with_entropies] == [tokens for tokens, _ in answers[-1][1]]
        check_entropies(folders[UPDATES[-1]], REQUESTS, with_entropies, SAMPLING[1].temperature)
    engine.close()
    return answers


def after_mistakes(spec: Recipe, folders: list[Path]) -> list[list[Answers]]:
    """After each mistake, the answers of the right weights."""
    policy = Exported(spec, folders)
    weights = Chosen(policy)
    engine = engine_of(spec, policy.mesh, weights)

    def refit(source: Weights, version: int) -> None:
        weights.source = source
        engine.refit(version)

    right = tensors(folders[1])
    misnamed = [(name.replace("1.self_attn.k_proj", "1.self_attn.kk_proj"), tensor) for name, tensor in right]
    misshapen = [(name, tensor[:-1] if "1.mlp.up_proj" in name else tensor) for name, tensor in right]
    half_sent = [(name, tensor) for name, tensor in right if "1.self_attn.k_proj" not in name]
    mistakes: dict[str, Weights] = {"kk_proj": misnamed, "": misshapen, "layers.1.self_attn.qkv_proj": half_sent}
    answers = []
    for words, wrong in mistakes.items():
        with pytest.raises(NoServer, match=words):
            refit(wrong, 1)
        refit(policy.become(1), 2)
        answers.append(everything(engine))
    # q, k and v apart: the parts of a fused tensor arrive in updates of their own, and are kept until the last is there
    refit(tensors(folders[2]), 3)
    refit(sorted(right, key=lambda member: member[0].split(".")[3:]), 4)
    answers.append(everything(engine))
    engine.close()
    return answers


def through_an_update(spec: Recipe, folders: list[Path]) -> None:
    """Responses that are being written when new weights come: every token is the one that its weights choose after those before it."""
    policy = Exported(spec, folders)
    engine = engine_of(spec, policy.mesh, policy)
    greedy = Sampling(max_tokens=200, temperature=0.0)
    requests = [Request([n, 7, n], n) for n in range(24)]
    for wait_s in (0.3, 0.1, 0.6, 1.2):  # until an update comes neither too early nor too late
        policy.become(0)
        engine.refit(1)
        drawing = Background().begin(partial(engine.generate, requests, greedy))
        time.sleep(wait_s)
        policy.become(1)
        engine.refit(2)
        through = engine.attend(drawing)
        both = shared([(r, c, c.versions.index(2)) for r, c in zip(requests, through, strict=False) if set(c.versions) == {1, 2}])
        if len(both) > 4:
            break
    assert len(both) > 4
    assert all(c.versions == sorted(c.versions) for c in through)
    for model, version in ((0, 3), (1, 4)):
        policy.become(model)
        engine.refit(version)
        asked = [Request([*r.prompt, *(c.tokens[:at] if model else [])], 0) for r, c, at in both]
        wanted = [(c.tokens[at:], c.log_probs[at:]) if model else (c.tokens[:at], c.log_probs[:at]) for _, c, at in both]
        for (tokens, log_probs), answer in zip(wanted, complete(engine, asked, greedy), strict=False):
            assert answer.tokens[: len(tokens)] == tokens
            torch.testing.assert_close(torch.tensor(answer.log_probs[: len(tokens)]), torch.tensor(log_probs), atol=2e-5, rtol=0)
    engine.close()


def whole_runs(folder: Path, servers: list[tuple[str, subprocess.Popen[bytes]]]) -> None:
    """At staleness 0, with one of two servers killed on the way, a run has the numbers of engines in its own processes. The one that stays
    was killed before, and has come back."""
    task = make_task(folder / "task", vocab_size=99, num_hidden_layers=4)
    (task / "verifier.py").write_text("def score(response, row):\n    return float(len(response.split()) % 2)\n")
    asked = {"max_response_length": 12, "servers": [url for url, _ in servers], "fork_temperature": FORKS}
    file = write_recipe(task, parallel={"tp": 2}, rollout=asked, reward={"verifier": f"{task}/verifier.py:score"}, train={"steps": 8})

    def metrics(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (task / "runs" / name / "metrics.jsonl").read_text().splitlines()]

    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        run_on_forks("train", file, f"run.name={name}", *overrides)
        return metrics(name)

    def run_and_kill(name: str) -> list[dict[str, Any]]:
        done = start_megafork("train", str(file), f"run.name={name}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log = task / "runs" / name / "metrics.jsonl"
        while not (log.exists() and '"step": 3,' in log.read_text()):
            assert done.poll() is None
            time.sleep(0.01)
        server_of(servers[1][1]).kill()
        said, _ = done.communicate(timeout=200)
        assert done.returncode == 0, said
        return metrics(name)

    wanted, killed = run("colocated", "rollout.servers=[]"), run_and_kill("killed")
    assert min(row["refit/servers"] for row in killed if "refit/servers" in row) == 1
    clocks = ("time/", "throughput/", "memory/", "rollout/idle_share", "refit/")
    for there, here in zip(killed, wanted, strict=True):
        mine, theirs = ({k: v for k, v in row.items() if not k.startswith(clocks)} for row in (there, here))
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert wanted[-1]["accuracy/mean"] > 0 and wanted[-1]["grad_norm"] > 0
    unscored = ["rollout.fork_temperature=null", "forks.entropy_from=rollout", "loss.old_log_prob=current", "train.minibatches=1"]
    kit = ["loss.importance_cap=2", "loss.mismatch.token_mask=[0.5,2]"]
    stale = run("stale", "rollout.staleness=2", *unscored, *kit, f"rollout.servers=[{servers[0][0]}]")  # the other is starting
    behind = [row["staleness/max"] for row in stale[1:]]
    assert behind[0] == 0.0 and max(behind) == 2.0, "a slow server writes with newer weights than those that it began with"
    late = [row for row in stale[1:] if row["staleness/max"] > 0]
    assert all(row["rollout_mismatch/max"] > 1e-3 for row in late), "stale weights give other log-probs"
    assert all("time/score" not in row and row["rollout_mismatch/entropy"] > 1e-5 for row in late), "and other entropies"
    assert all(0 <= row["loss/masked_fraction"] < 1 and row["loss/importance"] > 0 for row in late if "loss/policy" in row)


def through_a_kill(spec: Recipe, folders: list[Path], process: int) -> None:
    policy = Exported(spec, folders)
    engine = engine_of(spec, policy.mesh, policy)
    requests = [Request(PROMPTS[n % 3], request_seed(2, n)) for n in range(48)]
    sampling = Sampling(max_tokens=64, temperature=1.0)
    policy.become(2)
    engine.refit(1)
    started = time.monotonic()
    unbroken = complete(engine, requests, sampling)
    took = time.monotonic() - started
    assert engine.serving == 2
    kill = threading.Timer(took / 8, os.kill, (process, signal.SIGKILL))  # early: all is warm now, and may go faster
    if engine.rank == 0:
        kill.start()
    broken = complete(engine, requests, sampling)
    if engine.rank == 0:
        assert kill.finished.is_set(), "the kill came too late"
    same(broken, unbroken)
    policy.become(1)
    engine.refit(2)
    second = complete(engine, requests, sampling)
    if engine.rank == 0:
        wait_until_well(spec.rollout.servers[0])
    until = time.monotonic() + 60
    while not shared(engine.serving == 2) and shared(time.monotonic() < until):  # it is fed in the middle of a roll-out
        same(complete(engine, requests, sampling), second)
    assert shared(engine.serving == 2)
    same(complete(engine, requests, sampling), second)  # half of them from the server that was killed
    engine.close()


def wait_until_well(url: str, limit_s: float = 300.0) -> None:
    """Until vLLM, which is started again, answers; without asking it for anything meanwhile."""
    until = time.monotonic() + limit_s
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/health", headers=credentials()), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until, f"{url} did not come back"
            time.sleep(1.0)


def shared(said: T) -> T:
    """What rank 0 says."""
    box = [said]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def same(some: list[Any], others: list[Any]) -> None:
    """The same tokens; log-probs as near as another batch around a request, or another TP, leaves them."""
    assert [(c.tokens, c.truncated, c.versions) for c in some] == [(c.tokens, c.truncated, c.versions) for c in others]
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=2e-5, rtol=0)
