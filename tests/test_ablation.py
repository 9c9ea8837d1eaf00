"""Ablations: the statistics against scipy's two-sample forms and tables, the numbers against the runs' own files, and real trials that
fail, are killed, and resume."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command import megafork, start_megafork
from scipy import stats
from task import make_task
from trials import recipes, shown, write_run

from megafork import commands
from megafork.ablate.options import AblationOptions, check_begun
from megafork.ablate.results import summarise
from megafork.ablate.statistics import Paired, Spread, paired, spread
from megafork.recipe import RecipeError

__all__ = ["recipes"]


def test_paired_differences_as_in_students_table() -> None:
    """t of 2 degrees of freedom at 97.5% is 4.303; 1, 2, 3 have mean 2 and standard error 1 / sqrt 3."""
    found = paired([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.n == 3
    assert found.high is not None and found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low is not None and 2 - found.low == pytest.approx(found.high - 2)
    ours, theirs = np.random.default_rng(1).random((2, 40))
    two = stats.ttest_rel(ours, theirs)
    assert paired((ours - theirs).tolist()).p == pytest.approx(two.pvalue)
    assert spread([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)


def test_what_a_single_or_a_constant_difference_does_not_say() -> None:
    assert paired([0.5]) == Paired(0.5, None, None, None, 1)
    assert paired([0.5, 0.5, 0.5]) == Paired(0.5, None, None, None, 3)
    assert (spread([2.0]), spread([])) == (Spread(2.0, None), Spread(None, None))


def test_trials_are_the_recipes_with_each_seed(recipes: list[str]) -> None:
    options = AblationOptions.parse([*recipes, "train.steps=5", recipes[0]], "3, 1", "out")
    trials = options.trials()
    assert [str(trial) for trial in trials] == ["top, seed 3", "all, seed 3", "top, seed 1", "all, seed 1"]
    assert [str(trial.recipe.run_folder) for trial in trials[:2]] == ["out/top-seed_3", "out/all-seed_3"]
    assert [trial.recipe.run.seed for trial in trials] == [3, 3, 1, 1]
    assert {trial.recipe.train.steps for trial in trials} == {5}
    assert [trial.recipe.forks.select for trial in trials[:2]] == ["top", "all"]


REFUSED = {
    ("train.steps=5",): "RECIPE is missing",
    ("top.yaml", "run.seed=5"): "override 'run.seed=5' is set for each trial: give --seeds and --out instead",
    ("top.yaml", "./top.yaml"): "RECIPE 'top' is given twice",
    ("top.yaml", "nowhere.yaml"): "does not exist",
    ("top.yaml", "data.eval=null"): "data.eval of 'top' is unset",
    ("top.yaml", "other.yaml"): "data.eval or the section eval of 'other' differs from 'top'",
    ("top.yaml", "forks.select=none"): "forks.select is 'none'",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_cannot_be_compared(arguments: tuple[str, ...], recipes: list[str]) -> None:
    Path("other.yaml").write_text("extends: top.yaml\neval: {samples: 4}\n")
    with pytest.raises(RecipeError) as caught:
        AblationOptions.parse(arguments, "1,2", "out").trials()
    assert REFUSED[arguments] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("seeds", ["", "1,1", "1,,2", "-1", "one", "01,1"])
def test_wrong_seeds(seeds: str) -> None:
    with pytest.raises(RecipeError, match=r"--seeds is .*: give distinct integers such as 1,2,3"):
        AblationOptions.parse(["top.yaml"], seeds, "out")


def test_a_run_of_other_settings_is_not_taken_for_the_trial(recipes: list[str]) -> None:
    [trial] = AblationOptions.parse(["top.yaml"], "1", "out").trials()
    trial.recipe.run_folder.mkdir(parents=True)
    (trial.recipe.run_folder / "recipe.yaml").write_text(trial.recipe.to_yaml())
    for fine in ((), ("train.steps=4",), ("log.text=true",), ("run.ranks=2",), ("rollout.max_empty_steps=20",)):
        check_begun(AblationOptions.parse(["top.yaml", *fine], "1", "out").trials()[0])
    for key, was, now in (("optimizer.lr", "0.003", "0.001"), ("train.steps", "3", "2"), ("forks.select", "top", "all")):
        [other] = AblationOptions.parse(["top.yaml", f"{key}={now}"], "1", "out").trials()
        with pytest.raises(RecipeError, match=f"--out has 'out/top-seed_1', a run with {key}={was}, not {now}: choose another --out"):
            check_begun(other)


def test_the_numbers_are_those_of_the_runs(recipes: list[str]) -> None:
    options = AblationOptions.parse([*recipes, "all2.yaml"], "1,2,3", "out")
    Path("all2.yaml").write_text("extends: all.yaml\n")
    trials = options.trials()
    ends = {"top": [0.5, 0.25, 0.75], "all": [0.25, 0.25, 0.5], "all2": [0.0, 0.0, 0.0]}
    for trial in trials:
        end = ends[trial.name][trial.seed - 1]
        prompts = [end, end + 0.25, end - 0.25, end] if trial.name == "top" else [end] * 4
        if trial.name != "all2":
            write_run(trial, [0.0, 0.8, end], prompts, eval__response_length=trial.seed, entropy__mean=0.1 * trial.seed)
    failed = {trial: "see above" for trial in trials if trial.name == "all2"}
    results = summarise(options, trials, failed)
    assert json.loads(Path("out/ablation.json").read_text()) == json.loads(json.dumps(results))
    top, every = results["recipes"]
    assert [run["end"] for run in top["runs"]] == ends["top"] and [run["best"] for run in every["runs"]] == [0.8] * 3
    assert [run["area"] for run in top["runs"]] == pytest.approx([(0.4 + (0.8 + end) / 2) / 2 for end in ends["top"]])
    assert top["end"] == {"mean": 0.5, "sd": 0.25}
    assert every["length"] == {"mean": 2.0, "sd": 1.0} and every["entropy"]["mean"] == pytest.approx(0.2)
    assert every["seconds"]["mean"] == 90
    assert (top["runs"][1]["seed"], top["runs"][1]["folder"]) == (2, "out/top-seed_2")
    [comparison] = results["comparisons"]
    assert (comparison["recipe"], comparison["against"]) == ("all", "top")
    by_seed, by_prompt = comparison["end"]["seeds"], comparison["end"]["prompts"]
    assert by_seed["mean"] == pytest.approx(-1 / 6) and by_seed["n"] == 3
    assert by_seed["p"] == pytest.approx(stats.ttest_rel(ends["all"], ends["top"]).pvalue)
    assert by_prompt["n"] == 4 and by_prompt["mean"] == pytest.approx(-1 / 6)
    assert by_prompt["p"] == pytest.approx(stats.ttest_1samp([-1 / 6, -1 / 6 - 0.25, -1 / 6 + 0.25, -1 / 6], 0).pvalue)
    assert results["failed"] == [{"recipe": "all2", "seed": seed, "why": "see above"} for seed in (1, 2, 3)]
    lines = shown(results, width=100)
    assert lines[1].split()[:4] == ["top", "3", "50.0", "±25.0"]
    assert next(line for line in lines if line.startswith("all ") and "seeds" in line).split() == (
        ["all", "end", "3", "seeds", "-16.7", "-52.5", "to", "+19.2", "0.18", "0.18"]
    )
    assert sum("4 prompts" in line for line in lines) == 1
    assert lines[-1] == "failed: all2, seed 3: see above"
    assert max(map(len, shown(results, width=80))) <= 80


def test_a_run_that_found_nothing_to_learn_from(recipes: list[str]) -> None:
    """Dynamic sampling may drop all groups of all steps: there is no entropy then."""
    options = AblationOptions.parse(recipes, "1", "out")
    trials = options.trials()
    for trial in trials:
        write_run(trial, [0.0, 0.0], [0.0, 0.0])
        file = trial.recipe.run_folder / "metrics.jsonl"
        file.write_text(file.read_text().replace("entropy/mean", "other"))
    results = summarise(options, trials, {})
    assert results["recipes"][0]["entropy"] == {"mean": None, "sd": None}
    assert shown(results, width=80)[1].split() == ["top", "1", "0.0", "0.0", "0.0", "1.0", "-", "1.0"]


def test_held_out_prompts_that_changed_between_runs(recipes: list[str]) -> None:
    options = AblationOptions.parse(recipes, "1", "out")
    trials = options.trials()
    write_run(trials[0], [0.0, 0.5], [0.5, 0.5])
    write_run(trials[1], [0.0, 0.5], [0.5, 0.5, 0.5])
    with pytest.raises(
        RecipeError, match=r"^data\.eval has changed between runs: 'out/top-seed_1' answered 2 held-out prompts and .* 3 held"
    ):
        summarise(options, trials, {})
    assert not Path(options.out, "ablation.json").exists()


def test_held_out_prompts_that_are_others_between_runs(recipes: list[str]) -> None:
    """Recipes with other training data may have other held-out prompts left out, as many as they may be."""
    options = AblationOptions.parse(recipes, "1", "out")
    trials = options.trials()
    for trial, problems in zip(trials, ("aa", "bb"), strict=True):
        write_run(trial, [0.0, 0.5], [0.5, 0.5])
        [file] = (trial.recipe.run_folder / "evaluations").iterdir()
        file.write_text(json.dumps({**json.loads(file.read_text()), "problems": problems}))
    with pytest.raises(RecipeError, match=r"^data\.eval has changed between runs: 'out/top-seed_1' and .* answered different prompts"):
        summarise(options, trials, {})


def test_recipes_whose_held_out_prompts_would_differ_are_refused_before_any_trains(recipes: list[str], tmp_path: Path) -> None:
    make_task(tmp_path)
    held_out = (tmp_path / "held_out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text((tmp_path / "train.jsonl").read_text() + held_out[0])
    Path("all.yaml").write_text(f"extends: top.yaml\ndata: {{train: {tmp_path / 'more.jsonl'}}}\n")
    with pytest.raises(RecipeError, match=r"^data.eval shares prompts with data.train, and different ones in top and all"):
        commands.ablate(AblationOptions.parse(recipes, "1", "out"))
    assert not Path("out").exists()


def test_one_seed_and_a_reference_that_failed(recipes: list[str]) -> None:
    options = AblationOptions.parse(recipes, "1,2", "out")
    trials = options.trials()
    for trial in trials:
        write_run(trial, [0.0, 0.5], [0.5, 0.5])
    one = summarise(replace(options, seeds=(1,)), trials[:2], {})
    assert one["recipes"][0]["end"] == {"mean": 0.5, "sd": None}
    assert one["comparisons"][0]["end"]["seeds"] == {"mean": 0.0, "low": None, "high": None, "p": None, "holm": None, "n": 1}
    unpaired = summarise(options, trials, {trials[0]: "x", trials[3]: "y"})
    assert unpaired["comparisons"] == [], "no seed in common"
    assert [len(row["runs"]) for row in unpaired["recipes"]] == [1, 1]
    for results in (one, unpaired):
        assert "None" not in "".join(shown(results, width=80))


ABLATE = ["ablate", "top.yaml", "all.yaml", "--seeds", "1", "--out", "out", "--json"]


def ablate() -> tuple[int, dict[str, Any], str]:
    done = megafork(*ABLATE, cwd=Path.cwd())
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr


@pytest.mark.slow
def test_real_trials_are_killed_fail_and_go_on(recipes: list[str], tmp_path: Path) -> None:
    make_task(tmp_path)
    top, every = Path("out/top-seed_1"), Path("out/all-seed_1")
    process = start_megafork(*ABLATE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (top / "checkpoints/step_000001").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "stopped by SIGINT; the same command resumes the run"
    assert not every.exists(), "nor did the next trial begin"

    (every / "metrics.jsonl").mkdir(parents=True)  # which the run can't write to
    code, results, errors = ablate()
    assert code == 1 and "IsADirectoryError" in errors
    assert [(one["recipe"], one["seed"]) for one in results["failed"]] == [("all", 1)]
    rows = [json.loads(line) for line in (top / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert results["recipes"][0]["runs"][0]["end"] == rows[-1]["eval/accuracy"]
    written = (top / "metrics.jsonl").stat().st_mtime_ns

    (every / "metrics.jsonl").rmdir()
    code, results, errors = ablate()
    assert (code, results["failed"]) == (0, [])
    assert "run 1 of 2: top, seed 1: done before" in errors.splitlines()
    assert (top / "metrics.jsonl").stat().st_mtime_ns == written
    assert results["comparisons"][0]["end"]["prompts"]["n"] == 20
    assert yaml.safe_load((every / "recipe.yaml").read_text())["forks"]["select"] == "all"
    assert (every / "report.html").exists()

    code, again, errors = ablate()
    assert (code, again) == (0, results) and errors.count("done before") == 2
