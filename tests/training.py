"""A few training steps on one fixed batch, on real ranks in any layout; `reference.py` has the same in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import routed
import torch
from tiny import recipe

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Recipe
from megafork.rl import prefix
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.packing import packer, placement
from megafork.shape import read_shape
from megafork.train.clock import Clock
from megafork.train.learner import Learner
from megafork.train.update import update_policy
from megafork.weights import policy_weights
from megafork.weights.huggingface import HuggingFaceWeights

Masks = dict[tuple[int, int], torch.Tensor]
"""Of each response's tokens, by (group, sample)."""
STEPS = 3
"""Of two updates each: all but the first have AdamW's moments, and weights that have moved."""
GROUPS = ((0, 1), (2,))
"""Which prompts make each mini-batch."""


def responses(seed: int = 5, count: int = 12) -> list[Response]:
    """Four responses to each of three prompts, of 1 to 16 tokens after 1 to 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        lengths = torch.randint(1, 17, (2,), generator=generator).tolist()
        prompt, answer = (torch.randint(0, 99, (length,), generator=generator, dtype=torch.int32) for length in lengths)
        advantage = float(torch.randn((), generator=generator))
        written = -4.6 + torch.randn(lengths[1], generator=generator)  # about log 1/99, as the roll-out engine would have it
        made.append(Response(n // 4, n % 4, n // 4, prompt, answer, written, False, advantage=advantage))
    return made


class Rig:
    """A rank's learner with the weights of the recipe's model, and the steps that it takes."""

    def __init__(self, spec: Recipe, device: torch.device | None = None, before: Rig | None = None) -> None:
        """`device`: the CPU, or what `rehearsal` plays. `before`: a rig of this device that is done, whose process groups are taken over if
        they are those of this layout: dozens of groups take as long as an update."""
        self.spec = spec
        alike = before is not None and before.spec.parallel == spec.parallel
        self.mesh: Mesh = before.mesh if before and alike else build_mesh(spec.parallel, seed=1, device=device or torch.device("cpu"))
        folder = Path(spec.model.path)
        self.shape = read_shape(folder)
        chunks = build_policy(self.shape, PolicyConfig.of(spec), self.mesh)
        policy_weights.load_policy(chunks, HuggingFaceWeights(folder), self.shape, self.mesh)
        self.learner = Learner(chunks, spec, self.mesh, updates=100)
        self.every = routed.given(responses(), spec)

    def minibatches(self, step: int = 0) -> Iterator[list[MicroBatch]]:
        pack = packer(self.mesh, whole=self.spec.micro_batch_padding, temperature=self.spec.rollout.temperature)
        for groups in GROUPS:
            members = [prefix.cut(r, self.spec, step=step) for r in self.every if r.group in groups]
            placed = placement([r.length for r in members], self.spec.micro_batch_tokens, self.mesh)[self.mesh.dp_rank]
            yield [pack([members[n] for n in micro]) for micro in placed]

    def update(self, number: int) -> tuple[list[list[MicroBatch]], dict[str, float]]:
        """`step`, with the micro-batches that it trained on."""
        minibatches = list(self.minibatches(number))
        return minibatches, update_policy(self.learner, minibatches, self.spec, step=number, clock=Clock())

    def step(self, number: int) -> tuple[dict[str, float], dict[tuple[int, ...], bool]]:
        """The update of `train.loop.Trainer.step` on the fixed batch: its metrics, and the mask of the tokens that this rank holds."""
        minibatches, metrics = self.update(number)
        masks: dict[tuple[int, ...], bool] = {}
        if self.mesh.is_last_stage:
            for micro in itertools.chain(*minibatches):
                masks.update(_by_token(micro, number))
        return metrics, masks

    def weights(self) -> dict[str, torch.Tensor]:
        self.learner.settle()
        return dict(policy_weights.export_policy(self.learner.chunks, self.shape, self.mesh))


def train_on_rank(specs: list[Recipe], plant: Callable[[], None] | None = None, steps: int = STEPS) -> list[dict[str, Any]]:
    """Some steps by each recipe, one after the other; `plant` may break something first."""
    if plant is not None:
        plant()
    results, rig = [], None
    for spec in specs:
        rig = Rig(spec, before=rig)
        taken = [rig.step(number) for number in range(steps)]
        masks = dict(itertools.chain(*(mask.items() for _, mask in taken)))
        results.append({"history": [metrics for metrics, _ in taken], "masks": masks, "weights": rig.weights()})
    return results


def _by_token(micro: MicroBatch, step: int) -> dict[tuple[int, ...], bool]:
    names = [(micro.responses[s].group, micro.responses[s].sample, o) for s, o in zip(micro.sequence, micro.offset, strict=True)]
    return {(step, g, s, int(o)): bool(m) for (g, s, o), m in zip(names, micro.mask, strict=True)}


SHARES = (0.2, 1.0)


Results = list[dict[str, Any]]
"""By share."""


def specs(folder: Path, sections: dict[str, Any]) -> list[Recipe]:
    base: dict[str, Any] = {"train": {"micro_batch_tokens": 64}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    return [recipe(folder, **merged, forks={"top_entropy_quantile": rho}) for rho in SHARES]


def compare(results: list[Results], wanted: Results, plain: Results | None = None) -> None:
    """Every rank's results against the reference, and every metric against another layout's."""
    for n, want in enumerate(wanted):
        masks: dict[Any, bool] = {}
        for result in results:
            masks.update(result[n]["masks"])
        assert masks == want["masks"]
        for result in results:
            history = result[n]["history"]
            assert repr(history) == repr(results[0][n]["history"]), "every rank knows the same numbers"  # NaN is equal to NaN
            for got, expected in zip(history, want["history"], strict=True):
                for name, value in expected.items():
                    assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
            if plain is not None:
                for got, expected in zip(history, plain[n]["history"], strict=True):
                    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
            for name, tensor in result[n]["weights"].items():
                assert (tensor.double() - want["weights"][name]).abs().max() < 2e-5, name
