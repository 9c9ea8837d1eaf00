"""Checkpoints: loadable under another layout, published whole or not at all, and refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import recipe, save_model
from training import Rig

from megafork.plan.parameters import stage_weights
from megafork.plan.saving import saving
from megafork.recipe import Recipe, RecipeError
from megafork.shape import read_shape
from megafork.weights.checkpoint import Checkpoints, complete, read_state
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.optimizer_state import optimizer_content
from megafork.weights.policy_weights import load_policy

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "PP2 CP2": (4, {"parallel": {"pp": 2, "cp": 2}}),
    "PP2 VPP2": (2, {"parallel": {"pp": 2, "vpp": 2}}),
    "PP2 uneven": (2, {"parallel": {"pp": 2, "last_stage_layers": 1}}),
    "TP4": (4, {"parallel": {"tp": 4}}),
}


def _spec(folder: Path, sections: dict[str, Any]) -> Recipe:
    return recipe(folder, **{"train": {"micro_batch_tokens": 64}, "optimizer": {"lr": 1e-2, "eps": 1e-2}, **sections})


def _go_on(rig: Rig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    return [rig.step(number)[0] for number in range(2)], rig.weights()


def _save_and_go_on(spec: Recipe, folder: Path, background: bool) -> Any:
    """Two steps, a checkpoint, two more steps; the one in the background is published after the first of them has changed the weights."""
    rig = Rig(spec)
    for number in range(2):
        rig.step(number)
    checkpoints = Checkpoints(folder, rig.mesh, keep_last=2, asynchronous=background)
    checkpoints.save(2, rig.learner.chunks, rig.learner.optimizer, {"answer": 42})
    after = _go_on(rig)
    if background:
        assert not complete(folder), "nothing is published before it is asked for"
    checkpoints.settle(wait=True)
    return after


def _load_and_go_on(spec: Recipe, folder: Path) -> Any:
    rig = Rig(spec)
    state = Checkpoints(folder, rig.mesh, keep_last=2).load(2, rig.learner.chunks, rig.learner.optimizer)
    assert state["answer"] == 42
    return _go_on(rig)


@pytest.mark.slow
@pytest.mark.parametrize(("background", "tied"), [(False, True), (True, False)], ids=["at once, tied", "in the background, untied"])
def test_saved_under_one_layout_continued_under_others(background: bool, tied: bool, tmp_path: Path) -> None:
    """Weights and the optimizer's state are found by what they are, not by the rank that wrote them."""
    model, folder = save_model(tmp_path / "m", tie_word_embeddings=tied), tmp_path / "checkpoints"
    history, weights = on_ranks(4, _save_and_go_on, _spec(model, {"parallel": {"tp": 2, "sp": True}}), folder, background)[0]
    assert [name.name for name in folder.iterdir()] == ["step_000002"]
    assert read_state(folder / "step_000002")["answer"] == 42
    for name, (world, sections) in LAYOUTS.items():
        for got, loaded in on_ranks(world, _load_and_go_on, _spec(model, sections), folder):
            for step, expected in zip(got, history, strict=True):
                assert step == pytest.approx(expected, rel=1e-4, abs=1e-6), name
            assert all((loaded[key] - weights[key]).abs().max() < 2e-5 for key in weights), name


def _read(spec: Recipe, folder: Path) -> tuple[int, int, int]:
    """Bytes read from a checkpoint, to verify and to load it, the size of its tensor files, and bytes read from the model's folder."""
    rig = Rig(spec)
    source = HuggingFaceWeights(Path(spec.model.path))
    mapped = Counted()
    with mapped:
        load_policy(rig.learner.chunks, source, rig.shape, rig.mesh)
    checkpoints = Checkpoints(folder, rig.mesh, keep_last=2)
    checkpoints.save(1, rig.learner.chunks, rig.learner.optimizer, {})
    checkpoints.load(1, rig.learner.chunks, rig.learner.optimizer)  # whatever is imported or cached is by now
    counted = Counted()
    with counted:
        checkpoints.load(1, rig.learner.chunks, rig.learner.optimizer)
    files = sum(file.stat().st_size for file in (folder / "step_000001").glob("*.distcp"))
    return counted.read, files, mapped.read


class Counted:
    """Counts what this process reads by system calls in a `with` block."""

    def __enter__(self) -> None:
        self.read = -self._now()

    def __exit__(self, *error: object) -> None:
        self.read += self._now()

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_job_reads_a_checkpoint_once_and_a_node_s_ranks_share_the_pages_of_a_folder(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", hidden_size=256, intermediate_size=1024, vocab_size=4096)
    for number, (world, sections) in enumerate(((4, {}), (4, {"parallel": {"tp": 2}}))):
        seen = on_ranks(world, _read, _spec(model, sections), tmp_path / str(number))
        size = seen[0][1]
        assert size > 5e6
        shape, spec = read_shape(model), _spec(model, sections)
        planned = saving(shape, spec, world, [stage_weights(shape, spec, 0, world)])
        assert planned.total == pytest.approx(size, rel=0.02)
        ranks = [sum(f.stat().st_size for f in (tmp_path / str(number)).glob(f"*/__{rank}_*.distcp")) for rank in range(world)]
        assert min(ranks) > 0 and planned.written == pytest.approx(max(ranks), rel=0.25), "the largest parameter is a fifth of a share"
        # once to verify the files, once to load them; a replica that read its weights itself would add a quarter of the files
        assert sum(read for read, *_ in seen) < 2.2 * size
        # pages of the file that ranks of a node share, whichever parts they need; what is read by calls are the headers, and /proc itself
        assert max(read for *_, read in seen) < 1e5 < (model / "model.safetensors").stat().st_size / 10


def _damage(spec: Recipe, folder: Path) -> list[str]:
    """What loading says of a checkpoint with one byte changed in one file after the other."""
    rig = Rig(spec)
    checkpoints = Checkpoints(folder, rig.mesh, keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, rig.learner.chunks, rig.learner.optimizer, {"step": step})
    said = []
    for file in sorted((folder / "step_000003").iterdir()):
        whole = file.read_bytes()
        torch.distributed.barrier()
        if rig.mesh.is_rank_zero:
            file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        torch.distributed.barrier()
        try:
            checkpoints.load(3, rig.learner.chunks, rig.learner.optimizer)
            said.append(f"{file.name} was taken")
        except RecipeError as error:
            said.append(str(error))
        torch.distributed.barrier()
        if rig.mesh.is_rank_zero:
            file.write_bytes(whole)
        torch.distributed.barrier()
    checkpoints.load(3, rig.learner.chunks, rig.learner.optimizer)
    return said


def test_a_changed_byte_is_refused_and_the_checkpoint_before_it_is_offered(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said, other = on_ranks(2, _damage, _spec(save_model(tmp_path / "m"), {}), folder)
    assert said == other, "every rank refuses"
    assert [step for step, _ in complete(folder)] == [2, 3], "keep_last"
    assert len(said) >= 5
    for line in said:
        assert line.startswith("the checkpoint step_000003 is damaged (")
        assert line.endswith("to continue from step_000002, or choose another run.name")


def test_a_checkpoint_that_lacks_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "step_000001"
    folder.mkdir()
    with pytest.raises(RecipeError, match=r"checksums\.json.*to start anew \(there is none before it\)"):
        read_state(folder)
    (folder / "checksums.json").write_text(json.dumps({"__0_0.distcp": [7, "0"]}))
    with pytest.raises(RecipeError, match=r"__0_0\.distcp has 0 of 7 bytes"):
        read_state(folder)


def _settings_after_loading(spec: Recipe, changed: Recipe, folder: Path) -> list[tuple[Any, ...]]:
    """Adam's settings and steps in a run that goes on with a changed recipe."""
    before = Rig(spec)
    before.step(0)
    Checkpoints(folder, before.mesh, keep_last=2).save(1, before.learner.chunks, before.learner.optimizer, {})
    rig = Rig(changed, before=before)
    Checkpoints(folder, rig.mesh, keep_last=2).load(1, rig.learner.chunks, rig.learner.optimizer)
    rig.step(1)
    adam = rig.learner.optimizer.chained_optimizers[0].optimizer
    steps = {float(state["step"]) for state in adam.state.values()}
    return [(group["betas"], group["eps"], group["lr"], group["weight_decay"], steps) for group in adam.param_groups]


def test_a_resumed_run_takes_the_settings_of_its_recipe_and_the_steps_of_its_checkpoint(tmp_path: Path) -> None:
    model, changes = save_model(tmp_path / "m"), {"lr": 5e-3, "betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.25}
    [found] = on_ranks(1, _settings_after_loading, _spec(model, {}), _spec(model, {"optimizer": changes}), tmp_path / "checkpoints")
    assert found == [((0.5, 0.75), 1e-3, 5e-3, decay, {4.0}) for decay in (0.25, 0.0)]


def _skip(spec: Recipe) -> list[Any]:
    """Steps in which one rank's loss is infinite, between others."""
    rig = Rig(spec)
    seen: list[Any] = []
    for poisoned in (False, True, True, False):
        micros = next(rig.minibatches())
        for micro in micros:
            micro.mask = torch.ones_like(micro.positions, dtype=torch.bool)
            micro.weight = torch.full_like(micro.advantage, torch.inf if poisoned and rig.mesh.rank == 1 else 0.01)
        before = rig.weights()
        done = rig.learner.train(micros, lambda log_prob, micro: (-log_prob, {}))
        changed = any(not torch.equal(before[name], tensor) for name, tensor in rig.weights().items())
        seen.append((done["skipped"], changed, rig.learner.skips_in_a_row))
    return seen


@pytest.mark.parametrize(
    ("parallel", "dtype", "overlap"),
    [({}, "fp32", False), ({"tp": 2}, "bf16", False), ({"pp": 2}, "fp32", False), ({}, "bf16", True)],
    ids=["DP2", "TP2 bf16", "PP2", "DP2 bf16 overlap"],
)
def test_every_rank_skips_an_update_without_finite_gradients(parallel: Any, dtype: str, overlap: bool, tmp_path: Path) -> None:
    spec = _spec(save_model(tmp_path), {"parallel": parallel, "precision": {"dtype": dtype}, "optimizer": {"overlap": overlap, "lr": 0.1}})
    for seen in on_ranks(2, _skip, spec):
        assert seen == [(0.0, True, 0), (1.0, False, 1), (1.0, False, 2), (0.0, True, 0)]


def _sizes(spec: Recipe, folder: Path) -> tuple[int, int, int]:
    """Bytes that each rank of two replicas writes, at most holds of the optimizer for it, and has of it in all."""
    rig = Rig(spec)
    rig.step(0)
    checkpoints = Checkpoints(folder, rig.mesh, keep_last=2)
    content = optimizer_content(rig.learner.optimizer, {"model": rig.learner.chunks[0].sharded_state_dict()}, loading=False)
    kept = sum(tensor.data.numel() for state in content["param_state"].values() for tensor in state.values() if hasattr(tensor, "data"))
    checkpoints.save(1, rig.learner.chunks, rig.learner.optimizer, {})
    written = sum(file.stat().st_size for file in (folder / "step_000001").glob(f"__{rig.mesh.rank}_*"))
    return written, kept, 3 * sum(parameter.numel() for parameter in rig.learner.chunks[0].parameters())


def test_every_replica_writes_and_holds_its_share_alone(tmp_path: Path) -> None:
    (one, kept, every), (other, kept_other, _) = on_ranks(2, _sizes, _spec(save_model(tmp_path / "m"), {}), tmp_path / "checkpoints")
    assert kept + kept_other == every and max(kept, kept_other) < 0.6 * every, "no rank gathers the whole optimizer"
    assert max(one, other) < 0.6 * (one + other), "both write"
