"""A run that trains nothing, or that trains and rolls out different models, says so and ends; one in a batch job gives signs of life."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import megafork, run_on_forks
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from task import make_task, write_recipe

from megafork.parallel.mesh import build_mesh
from megafork.recipe import Parallel, Recipe
from megafork.train import batch_job
from megafork.train.batch_job import BatchJob
from megafork.train.remarks import MISMATCH, Remarks, mismatch
from megafork.weights.checkpoint import complete


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "d.jsonl"}, **sections})


def step(*, accuracy: float = 0.5, with_advantage: int = 8, errors: int = 0) -> dict[str, float | None]:
    return {
        "accuracy/mean": accuracy,
        "reward/errors": errors,
        "sampling/responses": 16,
        "sampling/with_advantage": with_advantage,
        "entropy/p80": None,
    }


def after(remarks: Remarks, metrics: dict[str, float | None], error: str | None = None) -> list[str]:
    return list(remarks.after(metrics, first=False, error=error, example="EXAMPLE"))


@pytest.mark.parametrize(
    ("accuracy", "why"), [(0.0, "every response is wrong"), (1.0, "every response is right"), (0.4, "no prompt has both right and wrong")]
)
def test_the_first_step_without_anything_to_learn_from_is_told_and_some_in_a_row_end_the_run(accuracy: float, why: str) -> None:
    remarks = Remarks(recipe(rollout={"max_empty_steps": 3}))
    empty = step(accuracy=accuracy, with_advantage=0)
    for metrics in (step(), empty, empty, step()):  # two in a row are one too few
        told = after(remarks, metrics)
    assert told == [] and remarks.stop is None
    (told_first,) = after(remarks, empty)
    assert why in told_first and "EXAMPLE" in told_first
    assert after(remarks, empty) == [] and remarks.stop is None
    assert after(remarks, empty) == []
    assert remarks.stop is not None and why in remarks.stop and "3 steps in a row" in remarks.stop and "max_empty_steps" in remarks.stop


@pytest.mark.parametrize(
    ("sections", "found", "why"),
    [
        (
            {"forks": {"scope": "fixed", "threshold": 6.72}},
            {"update/tokens": 0, "entropy/p50": 0.01, "entropy/p95": 1.25},
            "half of the entropies are up to 0.01 nats, 95% up to 1.25: choose another forks.threshold than 6.72",
        ),
        (
            {"forks": {"select": "rsi", "rsi_interval": [90, 100]}},
            {"update/tokens": 0},
            "forks.select=rsi selects no token within forks.rsi_interval=[90.0, 100.0]: widen it",
        ),
        (
            {"loss": {"mismatch": {"sequence_mask": [1, 1]}}},
            {"update/tokens": 7, "loss/masked_fraction": 1.0},
            "outside the bounds of loss.mismatch",
        ),
    ],
    ids=["threshold", "rule", "mismatch"],
)
def test_steps_that_train_on_no_token_are_told_and_end_the_run(sections: Any, found: dict[str, float], why: str) -> None:
    remarks = Remarks(recipe(rollout={"max_empty_steps": 2}, **sections))
    assert after(remarks, {**step(), "update/tokens": 7, "loss/masked_fraction": 0.5}) == []
    (told,) = after(remarks, {**step(), **found})
    assert why in told and "EXAMPLE" not in told and remarks.stop is None
    assert after(remarks, {**step(), **found}) == []
    assert remarks.stop is not None and why in remarks.stop and "2 steps in a row" in remarks.stop


def test_a_verifier_that_fails_on_every_response_ends_the_run_at_once() -> None:
    remarks = Remarks(recipe())
    assert after(remarks, step(errors=15), "KeyError: 'x'") == ["15 responses could not be judged and count as wrong: KeyError: 'x'"]
    assert after(remarks, step(errors=3), "KeyError: 'x'") == [] and remarks.stop is None  # once is enough
    after(remarks, step(errors=16, with_advantage=0), "KeyError: 'x'")
    assert remarks.stop is not None and remarks.stop.startswith("the verifier failed on all 16 responses (KeyError: 'x')")


@pytest.mark.parametrize(
    ("precision", "kind"),
    [({"dtype": "fp32"}, "fp32"), ({"dtype": "bf16"}, "bf16"), ({"rollout_fp8": True}, "fp8"), ({"train_fp8": True}, "fp8")],
)
def test_how_much_of_a_mismatch_a_precision_explains(precision: dict[str, Any], kind: str) -> None:
    spec = recipe(precision=precision, loss={"importance_cap": 2.0})
    for kl, fine in ((0.0, True), (MISMATCH[kind], True), (MISMATCH[kind] * 1.01, False), (float("nan"), False), (3.97, False)):
        assert (mismatch({"rollout_mismatch/kl": kl, "rollout_mismatch/max": 1.0}, spec) is None) == fine
    own = recipe(precision=precision, loss={"importance_cap": 2.0}, rollout={"max_mismatch": 4.0})
    assert mismatch({"rollout_mismatch/kl": 3.97, "rollout_mismatch/max": 1.0}, own) is None


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def train(folder: Path, *overrides: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, what was written for people, and the metrics of each step."""
    write_recipe(folder, rollout={"max_refills": 0})
    ended = megafork("train", "recipe.yaml", *overrides, cwd=folder)
    name = next((o.removeprefix("run.name=") for o in overrides if o.startswith("run.name=")), "run")
    file = folder / "runs" / name / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return ended.returncode, ended.stdout + ended.stderr, [row for row in rows if row["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", ["true", "false"])
def test_answers_that_are_never_right(dynamic: str, task: Path) -> None:
    rows = [{**json.loads(line), "answer": "no such word"} for line in (task / "train.jsonl").read_text().splitlines()]
    (task / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"run.name=wrong-{dynamic}", "data.train=wrong.jsonl", "data.eval=null", f"rollout.dynamic_sampling={dynamic}")
    code, said, metrics = train(task, *words, "rollout.max_empty_steps=2", "train.steps=4")
    assert code == 1 and "Traceback" not in said
    assert said.count("nothing to learn from: every response is wrong") == 1 and "for example, the response to 'max " in said
    assert "step 2: 2 steps in a row had nothing to learn from (rollout.max_empty_steps): every response is wrong" in said
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(1.0 <= row["response_length/mean"] <= 4.0 and 0.0 < row["response_length/truncated"] < 1.0 for row in metrics)
    if dynamic == "true":
        code, _, metrics = train(task, *words, "rollout.max_empty_steps=9", "train.steps=3")
        assert code == 0 and [row["step"] for row in metrics] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("held_out", ["held_out.jsonl", "null"])
def test_a_verifier_that_always_fails(held_out: str, task: Path) -> None:
    (task / "verifier.py").write_text("def score(response, row):\n    return row['no such field']\n")
    name = f"run.name=fails-{held_out[0]}"
    code, said, metrics = train(task, name, "reward.verifier=verifier.py:score", f"data.eval={held_out}")
    assert code == 1 and "Traceback" not in said and "the verifier failed on all " in said and "KeyError: 'no such field'" in said
    assert [row["step"] for row in metrics] == ([1] if held_out == "null" else [])


@pytest.mark.slow
def test_another_model_than_that_of_the_roll_out_is_not_trained(task: Path) -> None:
    words = ("run.name=mismatch", "rollout.max_mismatch=1e-30", "rollout.dynamic_sampling=false", "data.eval=null", "parallel.tp=2")
    code, said, metrics = train(task, *words)
    assert code == 1 and "Traceback" not in said and metrics == []
    assert "step 1: at equal weights vLLM's log-probs differ from the trainer's by a KL of " in said and "rollout.max_mismatch" in said


@pytest.mark.slow
def test_logits_that_are_no_numbers(task: Path) -> None:
    """Each weight is a number, but what the last norm makes of them is infinite."""
    model = task / "overflowing"
    model.mkdir()
    for file in (task / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for held_out in ("held_out.jsonl", "null"):
        code, said, metrics = train(task, "run.name=numbers", "model.path=overflowing", f"data.eval={held_out}")
        assert code == 2 and "Traceback" not in said and metrics == []
        assert "the model's log-probs are not numbers" in said


@pytest.mark.slow
def test_roll_outs_that_cannot_be_written(task: Path) -> None:
    """They are written in the background: the run ends at the next step, and has no checkpoint that would make it go on without them."""
    run = task / "runs/blocked"
    run.mkdir(parents=True)
    (run / "rollouts").write_text("not a folder")
    words = ("run.name=blocked", "rollout.dynamic_sampling=false", "data.eval=null", "checkpoint.every=1", "train.steps=3")
    code, said, metrics = train(task, *words)
    assert code == 1 and "Traceback" not in said and f"{run / 'rollouts'}: step 1 can't be written (" in said.replace("\n", "")
    assert [row["step"] for row in metrics] == [1] and complete(run / "checkpoints") == []
    (run / "rollouts").unlink()
    code, _, metrics = train(task, *words)
    assert code == 0 and [row["step"] for row in metrics] == [1, 2, 3]
    assert sorted(file.name for file in (run / "rollouts").iterdir()) == [f"step_{step:06d}.parquet" for step in (1, 2, 3)]


def _beats(folder: Path) -> list[str]:
    """What the heartbeat says, without its time, after each of a run's calls. Each change of an engine's state is a sign of life."""
    batch_job.BEAT_EVERY_S = 0.0  # of this rank's process
    job = BatchJob(build_mesh(Parallel(), seed=1, device=torch.device("cpu")), folder)
    said = []

    def heartbeat() -> None:
        file = folder / "heartbeat"
        said.append(file.read_text().partition(" at ")[0] if file.exists() else "")
        file.unlink(missing_ok=True)

    job.beat(3, "rollout")
    heartbeat()
    for state in ("8 to finish", "8 to finish", "7 to finish"):
        job.progress(partial(str, state))
        heartbeat()
    batch_job.BEAT_EVERY_S = 30.0
    for state in ("6 to finish", "5 to finish"):
        job.progress(partial(str, state))
        heartbeat()
    job.beat(3, "score")
    heartbeat()
    job.ended(3)
    heartbeat()
    return said if job._mesh.is_rank_zero else []


def test_an_engine_that_draws_nothing_gives_no_sign_of_life(tmp_path: Path) -> None:
    (said,) = on_ranks(1, _beats, tmp_path)
    rollout = "step 3, rollout"
    assert said == [rollout, f"{rollout}, 8 to finish", "", f"{rollout}, 7 to finish", f"{rollout}, 6 to finish", "", "step 3, score", ""]
    assert (tmp_path / "step").read_text() == "3\n"


def _on_two_ranks(folder: Path) -> None:
    job = BatchJob(build_mesh(Parallel(tp=2), seed=1, device=torch.device("cpu")), folder / str(torch.distributed.get_rank()))
    job.beat(1, "rollout")
    job.progress(lambda: "5 to finish")
    job.ended(1)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    on_ranks(2, _on_two_ranks, tmp_path)
    assert sorted(file.name for file in (tmp_path / "0").iterdir()) == ["heartbeat", "step"]
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.slow
def test_every_phase_and_a_roll_out_that_goes_on_are_signs_of_life(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With vLLM: more of its tokens are drawn at every look."""
    write = BatchJob._write

    def remember(job: BatchJob, name: str, text: str) -> None:
        write(job, name, text)
        if job._folder is not None and name == "heartbeat":
            with (job._folder / "all").open("a") as file:
                file.write(text.partition(" at ")[0] + "\n")

    monkeypatch.setattr(BatchJob, "_write", remember)
    monkeypatch.setattr(batch_job, "BEAT_EVERY_S", 0.0)
    monkeypatch.setenv(batch_job.JOB_FOLDER, str(tmp_path))
    file = write_recipe(task, data={"eval": None}, rollout={"dynamic_sampling": False}, train={"steps": 1})
    run_on_forks("train", file, "run.name=alive", "rollout.max_response_length=6")
    said = (tmp_path / "all").read_text().splitlines()
    drawn = [one for one in said if "to finish" in one]
    assert [one for one in said if one not in drawn] == [
        "step 0, begins",
        *(f"step 1, {phase}" for phase in ("rollout", "score", "update", "checkpoint", "refit", "export")),
    ]
    assert len(drawn) >= 6 and len(set(drawn)) == len(drawn), "each of vLLM's steps is seen, and none twice"
    assert drawn[0] == "step 1, rollout, 32 responses to finish, 0 tokens of them drawn"
    assert all(one.startswith("step 1, rollout, ") for one in drawn)
