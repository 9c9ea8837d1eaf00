"""A grid of settings: each recipe at its best, Holm's adjustment, and equal tokens as the common measure."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from trials import recipes, shown, write_run

from megafork.ablate.grid import settings, tuning_trials
from megafork.ablate.options import AblationOptions, Trial
from megafork.ablate.results import summarise
from megafork.ablate.run import Ablation
from megafork.ablate.statistics import holm
from megafork.recipe import Recipe, RecipeError

__all__ = ["recipes"]

# ---- a grid


def test_a_grid_is_every_combination_of_its_values() -> None:
    assert settings(["optimizer.lr=3e-4,7e-4", "loss.clip_high=0.2, 0.28"]) == [
        ("optimizer.lr=3e-4", "loss.clip_high=0.2"),
        ("optimizer.lr=3e-4", "loss.clip_high=0.28"),
        ("optimizer.lr=7e-4", "loss.clip_high=0.2"),
        ("optimizer.lr=7e-4", "loss.clip_high=0.28"),
    ]
    assert settings(["forks.rsi_interval=[0.5,2],[0.1,3]"]) == [("forks.rsi_interval=[0.5,2]",), ("forks.rsi_interval=[0.1,3]",)]
    for wrong in ("optimizer.lr", "optimizer.lr=1e-3", "lr=1,2", "optimizer.lr=1,1", "optimizer.lr=1,"):
        with pytest.raises(RecipeError, match=rf"^--grid is '{wrong}': give a key and distinct values"):
            settings([wrong])
    with pytest.raises(RecipeError, match=r"^--grid has optimizer.lr twice"):
        settings(["optimizer.lr=1,2", "optimizer.lr=3,4"])


def test_wrong_options_of_a_grid(recipes: list[str]) -> None:
    lr = ("optimizer.lr=1e-3,3e-3",)
    for grid, seeds, common, message in (
        (lr, None, "updates", "--grid is given without --tuning-seeds"),
        ((), "11", "updates", "--tuning-seeds is given without --grid"),
        (lr, "3,11", "updates", "--tuning-seeds has 3, as --seeds has"),
        (lr, "11,11", "updates", "--tuning-seeds is '11,11': give distinct integers"),
        (lr, "11", "time", "--common is 'time': must be one of updates, tokens"),
    ):
        with pytest.raises(RecipeError, match=f"^{message}"):
            AblationOptions.parse(recipes, "1,2,3", "out", grid, seeds, common)
    with pytest.raises(RecipeError, match=r"^optimizer\.lr is 'fast'"):
        tuning_trials(AblationOptions.parse(recipes, "1", "out", ("optimizer.lr=1e-3,fast",), "11"))
    with pytest.raises(RecipeError, match=r"both make the folder name 'lr_1e_3'"):
        tuning_trials(AblationOptions.parse(recipes, "1", "out", ("optimizer.lr=1e-3,1e+3",), "11"))


def test_each_recipe_is_compared_at_its_own_best_setting(recipes: list[str]) -> None:
    """`top` is best at 3e-3 and `all` at 1e-3 on the tuning seeds; a setting that failed once is out, however good."""
    options = AblationOptions.parse(recipes, "1,2", "out", ("optimizer.lr=1e-3,3e-3,9e-3",), "11,12")
    ends = {("top", 0.001): 0.2, ("top", 0.003): 0.4, ("top", 0.009): 0.9, ("all", 0.001): 0.3, ("all", 0.003): 0.3, ("all", 0.009): 0.1}
    trained: list[str] = []

    def attempt(recipe: Recipe) -> str | None:
        name = recipe.run.name.partition("-")[0]
        trained.append(f"{name} {recipe.optimizer.lr} {recipe.run.seed}")
        if (name, recipe.optimizer.lr, recipe.run.seed) == ("top", 0.009, 12):
            return "it broke"
        trial = Trial(name, recipe.run.seed, recipe)
        write_run(trial, [0.0, ends[name, recipe.optimizer.lr]], [0.5, 0.25 * recipe.run.seed % 1])
        return None

    said: list[str] = []
    ablation = Ablation(options, lambda recipe: None, attempt, said.append)
    results = ablation.run()
    assert trained[:3] == ["top 0.001 11", "top 0.003 11", "top 0.009 11"] and len(trained) == 2 * 3 * 2 + 2 * 2
    assert trained[12:] == ["top 0.003 1", "all 0.001 1", "top 0.003 2", "all 0.001 2"]
    assert [line for line in said if line.startswith("tuned")] == ["tuned: top: optimizer.lr=3e-3", "tuned: all: optimizer.lr=1e-3"]
    assert [(row["recipe"], row["setting"]) for row in results["tuning"] if row["chosen"]] == [
        ("top", ["optimizer.lr=3e-3"]),
        ("all", ["optimizer.lr=1e-3"]),
    ]
    assert [run["folder"] for run in results["recipes"][0]["runs"]] == ["out/top-seed_1", "out/top-seed_2"]
    assert results["tuning"][0]["runs"][0]["folder"] == "out/tuning/top-lr_1e_3-seed_11"
    assert results["failed"] == [{"recipe": "top-lr_9e_3", "seed": 12, "why": "it broke"}]
    lines = shown(results, width=80)
    assert lines[1].split() == ["top", "optimizer.lr=1e-3", "2", "20.0", "±0.0"]
    assert lines[2].split()[-1] == "chosen" and lines[3].split()[-1] == "failed"
    assert max(map(len, lines)) <= 80


def test_equal_tokens_are_the_common_measure(recipes: list[str]) -> None:
    """`top` learns from 100 tokens a step, `all` from 400: at 300 tokens `all` is three quarters through its first step."""
    options = AblationOptions.parse(recipes, "1,2", "out", common="tokens")
    trials = options.trials()
    for trial in trials:
        write_run(trial, [0.0, 0.2, 0.4, 0.6] if trial.name == "top" else [0.0, 0.4, 0.8, 0.8], [0.5, 0.5])
        file = trial.recipe.run_folder / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        tokens = 100 if trial.name == "top" else 400
        file.write_text("".join(json.dumps(row | ({"update/tokens": tokens} if row["step"] else {})) + "\n" for row in rows))
    results = summarise(options, trials, {})
    assert results["budget"] == 300
    top, every = ({name: recipe[name]["mean"] for name in ("end", "best", "area")} for recipe in results["recipes"])
    assert top == pytest.approx({"end": 0.6, "best": 0.6, "area": 0.3})
    assert every == pytest.approx({"end": 0.3, "best": 0.3, "area": 0.15})
    assert "prompts" not in results["comparisons"][0]["end"]
    assert "compared at 300 tokens with a loss" in shown(results, width=80)
    usual = summarise(replace(options, common="updates"), trials, {})
    assert usual["recipes"][1]["end"]["mean"] == pytest.approx(0.8) and usual["budget"] is None
    for trial in trials:
        file = trial.recipe.run_folder / "metrics.jsonl"
        file.write_text(file.read_text().replace("update/tokens", "other"))
    with pytest.raises(RecipeError, match=r"^--common is tokens, but a run has learned from none"):
        summarise(options, trials, {})


def test_holms_adjustment() -> None:
    """By hand: sorted p times 3, 2, 1, never below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.4]) == [pytest.approx(0.8), None, pytest.approx(0.8)]
    assert (holm([]), holm([None]), holm([0.9])) == ([], [None], [0.9])
