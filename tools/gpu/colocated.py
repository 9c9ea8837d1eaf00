"""A trainer and vLLM in one process, as in a roll-out on the training ranks: seconds and GPU memory of each phase as one line of JSON.

    python tools/gpu/colocated.py cycle MODEL [--dry]         sleep, refit and wake, twice: to other weights, and back
    python tools/gpu/colocated.py checkpoint MODEL [--dry]    a checkpoint while vLLM is awake

Exit code 1 if vLLM's answers do not change with the weights and return with them, if sleeping frees no memory, or if the checkpoint does
not hold the weights. `--dry`: in fp32, with short answers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh, join_world
from megafork.recipe import Recipe
from megafork.rollout.engine import Request, Sampling
from megafork.shape import read_shape
from megafork.train.engines import build_engine
from megafork.train.learner import Learner
from megafork.train.offload import Offload
from megafork.weights.checkpoint import Checkpoints
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import export_policy, load_policy

SAME = 0.9
"""Least share of tokens that return with the weights; a GPU may round differently."""


class Pair:
    """The trainer, with its training state parked, and an engine that has its weights and is awake."""

    def __init__(self, model: Path, *, dry: bool) -> None:
        rollout = {"max_response_length": 8 if dry else 512, "kv_cache_mb": 32 if dry else None}
        spec = Recipe.model_validate(
            {
                "model": {"path": str(model)},
                "data": {"train": "none", "max_prompt_length": 16},
                "rollout": rollout,
                "precision": {"dtype": "fp32" if dry else "bf16"},
                "reward": {"overlong": "none"},
            }
        )
        device, shape = join_world(), read_shape(model)
        self.mesh, self.shape = build_mesh(spec.parallel, seed=1, device=device), shape
        self.phases: dict[str, dict[str, float]] = {}
        with self.phase("trainer"):
            self.chunks = build_policy(shape, PolicyConfig.of(spec), self.mesh)
            load_policy(self.chunks, HuggingFaceWeights(model), shape, self.mesh)
            self.learner = Learner(self.chunks, spec, self.mesh, updates=1)
            self.offload = Offload(self.learner.model, self.learner.optimizer, device)
            self.offload.to_host()
        with self.phase("engine"):
            self.engine = build_engine(spec, self.mesh, self.chunks, shape)
        self.sampling = Sampling(max_tokens=spec.rollout.max_response_length)
        with self.phase("first refit"):
            self.engine.refit(0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.phases[name] = {"s": time.perf_counter() - start, "used_gb": self._used()}

    def _used(self) -> float:
        """GB of the GPU's memory that are in use, by whatever."""
        if self.mesh.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9

    def answers(self, name: str) -> list[int]:
        requests = [Request([seed % self.shape.vocab, 1, 2], seed) for seed in range(32)]
        with self.phase(name):
            drawn = self.engine.generate(requests, self.sampling)
        return [token for completion in drawn for token in completion.tokens]


def cycle(pair: Pair) -> dict[str, bool]:
    """Each cycle reverses every weight's rows: the second brings the first weights back."""
    answers = [pair.answers("roll-out 0")]
    for n in (1, 2):
        with pair.phase(f"sleep {n}"):
            pair.engine.sleep()
        with pair.phase(f"training state back {n}"):
            pair.offload.to_device()
        for parameter in (parameter for chunk in pair.chunks for parameter in chunk.parameters()):
            parameter.data.copy_(parameter.data.flip(0))
        with pair.phase(f"training state parked {n}"):
            pair.offload.to_host()
        with pair.phase(f"wake for weights, refit {n}"):
            pair.engine.wake("weights")
            pair.engine.refit(n)
        with pair.phase(f"wake for the KV cache {n}"):
            pair.engine.wake("kv_cache")
        answers.append(pair.answers(f"roll-out {n}"))
    slept, awake = (pair.phases[name]["used_gb"] for name in ("sleep 1", "roll-out 0"))
    return {
        "answers change with the weights": _share(answers[0], answers[1]) < SAME,
        "answers return with the weights": _share(answers[0], answers[2]) >= SAME,
        "sleeping frees memory": slept < awake or pair.mesh.device.type != "cuda",
    }


def _share(some: list[int], others: list[int]) -> float:
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)


def checkpoint(pair: Pair) -> dict[str, bool]:
    before = {name: tensor.clone() for name, tensor in export_policy(pair.chunks, pair.shape, pair.mesh)}
    answers = pair.answers("roll-out before")
    with pair.phase("training state back"):
        pair.offload.to_device()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), pair.mesh, keep_last=1)
        with pair.phase("save"):
            checkpoints.save(1, pair.chunks, pair.learner.optimizer, {})
        after = pair.answers("roll-out after")
        for parameter in (parameter for chunk in pair.chunks for parameter in chunk.parameters()):
            parameter.data.zero_()
        with pair.phase("load"):
            checkpoints.load(1, pair.chunks, pair.learner.optimizer)
    return {
        "the engine is undisturbed": _share(answers, after) >= SAME,
        "the checkpoint holds the weights": all(
            torch.equal(tensor, before[name]) for name, tensor in export_policy(pair.chunks, pair.shape, pair.mesh)
        ),
    }


def main(what: str, model: Path, dry: bool) -> int:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29654")
    pair = Pair(model, dry=dry)
    held = {"cycle": cycle, "checkpoint": checkpoint}[what](pair)
    figures: dict[str, Any] = {"phases": pair.phases, "held": held}
    sys.stdout.write(json.dumps(figures) + "\n")
    return not all(held.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), "--dry" in sys.argv))
