"""Training state parked in host memory between steps: nothing stays on the device, and no result changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from speed import by_speed
from tiny import MODELS, recipe, save_model
from training import STEPS, Rig

from megafork.plan.fixes import fixes
from megafork.plan.hardware import gpu_named
from megafork.plan.models import KNOWN
from megafork.plan.planner import make_plan
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe
from megafork.train.offload import Offload
from megafork.weights.checkpoint import Checkpoints

PARK = ["rollout.park_training=true"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP, bf16": {"parallel": {"tp": 2, "sp": True}, "precision": {"dtype": "bf16"}},
    "PP2 VPP2, fp32": {"parallel": {"pp": 2, "vpp": 2}},
    "EP2, fp32": {"parallel": {"ep": 2}},
    "DP2 overlap, bf16": {"optimizer": {"overlap": True}, "precision": {"dtype": "bf16"}},
}


def steps(spec: Recipe, folder: Path, park: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Three steps, a checkpoint saved after the second; parked before the first and after each."""
    rig = Rig(spec)
    learner, history = rig.learner, []
    offload = Offload(learner.model, learner.optimizer, rig.mesh.device)
    checkpoints = Checkpoints(folder, rig.mesh, keep_last=2)
    for number in range(STEPS):
        if park:
            offload.to_host()
            offload.to_host()  # it is already
            assert_parked(rig)
            if number == 2:
                checkpoints.save(2, learner.chunks, learner.optimizer, {})
            offload.to_device()
            offload.to_device()
            assert all(not buffer.grad_data.any() for buffer in buffers(rig))
        elif number == 2:
            checkpoints.save(2, learner.chunks, learner.optimizer, {})
        history.append(rig.step(number)[0])
        learner.settle()
    return history, rig.weights()


def buffers(rig: Rig) -> list[Any]:
    return [buffer for chunk in rig.learner.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def assert_parked(rig: Rig) -> None:
    for buffer in buffers(rig):
        assert buffer.grad_data.untyped_storage().nbytes() == 0
        assert buffer.param_data.untyped_storage().nbytes() > 0, "the refit reads the weights"


def continued(spec: Recipe, folders: list[Path]) -> list[Any]:
    found = []
    for folder in folders:
        rig = Rig(spec)
        Checkpoints(folder, rig.mesh, keep_last=2).load(2, rig.learner.chunks, rig.learner.optimizer)
        found.append((rig.step(2)[0], rig.weights()))
    return found


@pytest.mark.parametrize("layout", by_speed(LAYOUTS, ("DP2 overlap, bf16",)))
def test_a_run_that_is_parked_between_steps_is_the_same_run(layout: str, tmp_path: Path) -> None:
    base: dict[str, Any] = {"train": {"micro_batch_tokens": 64}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}
    changes = LAYOUTS[layout]
    architecture, model = MODELS["MoE" if "ep" in changes.get("parallel", {}) else "tied"]
    spec = recipe(
        save_model(tmp_path / "m", architecture, **model),
        **{**base, **changes, "optimizer": {**base["optimizer"], **changes.get("optimizer", {})}},
    )
    runs = [on_ranks(2, steps, spec, tmp_path / str(park), park)[0] for park in (False, True)]
    assert_same(runs[1], runs[0])
    for plain, parked in on_ranks(2, continued, spec, [tmp_path / "False", tmp_path / "True"]):
        assert_same(parked, plain)


def test_the_plan_has_the_room() -> None:
    file = Path(__file__).parent.parent / "recipes/qwen3_32b_fork.yaml"
    parked, plain = (make_plan(KNOWN["qwen3-32b"], load_recipe(file, change), 64, gpu_named("h100")) for change in (PARK, []))
    for one, other in zip(parked.stages, plain.stages, strict=True):
        moved = one.weights.gradient_bytes + max(one.weights.optimizer_bytes)
        assert {phase: other.phases[phase] - size for phase, size in one.phases.items()} == {"rollout": moved, "update": 0, "refit": moved}
    assert plain.step.refit < parked.step.refit < plain.step.refit + 1 and parked.step.rollout == plain.step.rollout
    crowded = make_plan(KNOWN["qwen3-32b"], load_recipe(file, ["rollout.gpu_memory_fraction=0.8"]), 64, gpu_named("h100"))
    assert not crowded.fits and {"rollout.park_training": True} in fixes(crowded)


def test_servers_have_gpus_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"rollout\.park_training is true with rollout\.servers: .* set it to false"):
        recipe(Path("m"), rollout={"servers": ["http://a:1"], "park_training": True})


def assert_same(some: Any, others: Any) -> None:
    assert some[0] == others[0]
    assert some[1].keys() == others[1].keys() and all(torch.equal(tensor, others[1][name]) for name, tensor in some[1].items())
