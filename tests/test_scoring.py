"""Steps whose entropies or old log-probs come from the roll-out: the same updates as with the trainer's own, without a scoring pass."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import recipe, save_model
from training import GROUPS, STEPS, Rig

from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch
from megafork.train.clock import Clock
from megafork.train.learner import Learner
from megafork.train.scoring import FIRST, sample
from megafork.train.update import update_policy

BASE: dict[str, Any] = {"train": {"micro_batch_tokens": 64}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}
ROLLOUT: dict[str, Any] = {"forks": {"entropy_from": "rollout"}, "loss": {"old_log_prob": "rollout"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 SP": (2, {"parallel": {"tp": 2, "sp": True}}),
    "CP2": (2, {"parallel": {"cp": 2}}),
    "DP2": (2, {}),
    "PP2 VPP2": (2, {"parallel": {"pp": 2, "vpp": 2}}),
}


class Engine(Rig):
    """A rig whose responses carry, before each step, the log-probs and entropies that an engine with the same weights would return."""

    def __init__(self, spec: Recipe, off: float, before: Rig | None) -> None:
        super().__init__(spec, before=before)
        self.off = off
        self.calls: list[int] = []
        """Responses on this rank in each call of `Learner.score` that the step makes."""

    def roll_out(self) -> None:
        """`off` is added to every other log-prob and entropy, as of older weights."""
        micros = list(itertools.chain(*self.minibatches()))
        self.learner.score(micros)
        told: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        if self.mesh.is_last_stage:
            for micro in micros:
                columns = [micro.by_response(values, self.mesh.cp_group) for values in (micro.old_log_prob, micro.entropy)]
                for response, *both in zip(micro.responses, *columns, strict=True):
                    told[response.group, response.sample] = both[0], both[1]
        every: list[dict[Any, Any]] = [{} for _ in range(self.mesh.world)]
        torch.distributed.all_gather_object(every, told)
        known = {name: values for part in every for name, values in part.items()}
        for response in self.every:
            log_probs, entropies = known[response.group, response.sample]
            shift = self.off * (torch.arange(len(log_probs)) % 2)
            response.log_probs, response.entropies = log_probs + shift, entropies + shift

    def counted(self, micros: list[MicroBatch], **how: Any) -> None:
        self.calls.append(sum(len(micro.responses) for micro in micros))
        Learner.score(self.learner, micros, **how)

    def steps(self) -> dict[str, Any]:
        history, masks, phases = [], [], []
        for number in range(STEPS):
            self.roll_out()
            self.learner.score = self.counted  # type: ignore[method-assign]
            minibatches, clock = list(self.minibatches()), Clock()
            if self.spec.train.minibatches == 1:
                minibatches = [list(itertools.chain(*minibatches))]
            history.append(update_policy(self.learner, minibatches, self.spec, step=number, clock=clock))
            del self.learner.score
            phases.append(set(clock.times))
            masks.append([micro.mask.tolist() for micro in itertools.chain(*minibatches)] if self.mesh.is_last_stage else [])
        return {"history": history, "masks": masks, "weights": self.weights(), "phases": phases, "calls": self.calls}


def _on_rank(specs: list[Recipe], off: float = 0.0) -> list[dict[str, Any]]:
    results, engine = [], None
    for spec in specs:
        engine = Engine(spec, off, engine)
        results.append(engine.steps())
    return results


def _changed(folder: Path, *changes: dict[str, Any], **layout: Any) -> list[Recipe]:
    made = []
    for change in changes:
        names = {*BASE, *layout, *change}
        made.append(recipe(folder, **{name: {**BASE.get(name, {}), **layout.get(name, {}), **change.get(name, {})} for name in names}))
    return made


def _assert_same_updates(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["masks"] == other["masks"]
    for mine, theirs in zip(one["history"], other["history"], strict=True):
        for key in ("loss/policy", "grad_norm", "forks/tau", "forks/fraction", "entropy/mean", "entropy/forks", "loss/clip_fraction"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(tensor, other["weights"][name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_by_the_rollouts_numbers_equal_those_by_the_trainers(layout: str, tmp_path: Path) -> None:
    world, sections = LAYOUTS[layout]
    once = {"train": {"minibatches": 1, "micro_batch_tokens": 64}}
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "both": ({}, {**ROLLOUT, "rollout": {"mismatch_responses": 5}}),
        "entropies, one threshold a step": ({"forks": {"scope": "batch"}}, {"forks": {"scope": "batch", "entropy_from": "rollout"}}),
        "the ratio is 1": (once, {**once, "forks": {"entropy_from": "rollout"}, "loss": {"old_log_prob": "current"}}),
        "the same, capped": (
            {**once, "loss": {"importance_cap": 1.5}},
            {**once, "loss": {"old_log_prob": "current", "importance_cap": 1.5}},
        ),
    }
    folder = save_model(tmp_path / "m")
    specs = [spec for pair in pairs.values() for spec in _changed(folder, *pair, **sections)]
    ranks = on_ranks(world, _on_rank, specs)
    assert [sum(calls) for calls in zip(*(rank[1]["calls"] for rank in ranks), strict=True)] == [5 * (1 if layout == "DP2" else 2)] * STEPS
    for rank in ranks:
        for n, what in enumerate(pairs):
            scored, other = rank[2 * n], rank[2 * n + 1]
            _assert_same_updates(other, scored)
            assert all(step["rollout_mismatch/max"] < 1e-5 and step["rollout_mismatch/kl"] < 1e-9 for step in other["history"]), what
            if "entropies" in what or what == "both":
                assert all(step["rollout_mismatch/mask"] == 0 and step["rollout_mismatch/entropy"] < 1e-6 for step in other["history"])
            scores = what != "both" and what != "the ratio is 1"
            assert other["phases"] == [{"score" if scores else "compare", "update"}] * STEPS
            if what == "the ratio is 1":
                assert all(step["loss/approx_kl"] == 0 and step["loss/clip_fraction"] == 0 for step in other["history"])
        whole = sum(len(mask) for mask in rank[0]["masks"])
        assert whole or layout.startswith("PP")


def test_nothing_is_scored_and_what_differs_is_measured(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    none, some, all_ = _changed(folder, *({**ROLLOUT, "rollout": {"mismatch_responses": n}} for n in (0, 6, 1000)))
    quiet, sampled, whole = on_ranks(1, _on_rank, [none, some, all_], 0.4)[0]
    assert quiet["calls"] == [] and quiet["phases"] == [{"update"}] * STEPS
    assert not any(key.startswith("rollout_mismatch") for step in quiet["history"] for key in step)
    assert sampled["calls"] == [6] * STEPS and whole["calls"] == [12] * STEPS
    for one in (sampled, whole):
        assert one["masks"] == quiet["masks"], "measuring changes nothing"
        for step in one["history"]:
            assert step["rollout_mismatch/max"] == pytest.approx(0.4, abs=1e-4)
            assert step["rollout_mismatch/entropy"] == pytest.approx(0.2, abs=0.03)
            assert 0 < step["rollout_mismatch/mask"] < 1
    kl = torch.tensor(-0.4).exp() - 1 + 0.4
    odd = [step["rollout_mismatch/kl"] / float(kl) for step in whole["history"]]
    assert odd == pytest.approx([step["rollout_mismatch/entropy"] / 0.4 for step in whole["history"]], rel=1e-3)


def _names(micros: list[MicroBatch]) -> set[tuple[int, int]]:
    return {(r.group, r.sample) for micro in micros for r in micro.responses}


def _sampled(spec: Recipe) -> list[tuple[set[tuple[int, int]], int, int]]:
    rig = Rig(spec)
    micros = list(itertools.chain(*rig.minibatches()))
    found = []
    for step, count in ((1, 4), (2, 4), (1, 5), (1, 1), (1, 99)):
        chosen = sample(micros, count, spec, rig.mesh, step)
        assert _names(chosen) <= _names(micros)
        assert all(sum(micro.lengths) <= 64 for micro in chosen)
        found.append((_names(chosen), len(chosen), rig.mesh.dp_rank))
    return found


def test_the_sample_is_the_same_for_every_layout(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    wholes = []
    for world, sections in ((1, {}), *LAYOUTS.values()):
        [spec] = _changed(folder, {}, **sections)
        ranks = on_ranks(world, _sampled, spec)
        assert len({tuple(count for _, count, _ in rank) for rank in ranks}) == 1, "as many micro-batches on every rank"
        wholes.append([set().union(*(rank[n][0] for rank in ranks)) for n in range(5)])
    assert all(whole == wholes[0] for whole in wholes)
    first, second, more, one, every = wholes[0]
    assert [len(part) for part in wholes[0]] == [4, 4, 5, 1, 12] and one < first < more < every and first != second
    assert FIRST >= 1 and len(GROUPS) == 2
