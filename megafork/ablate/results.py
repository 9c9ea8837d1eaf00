"""Results of an ablation, read from the folders of its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megafork.ablate.options import AblationOptions, Trial
from megafork.ablate.statistics import holm, paired, spread
from megafork.files import whole
from megafork.recipe import RecipeError
from megafork.report.charts import known_values, number
from megafork.run_folder import read_steps

Results = dict[str, Any]
ACCURACIES = ("end", "best", "area")
"""Measures of the curve of held-out accuracy: last value, highest value, and mean over the steps by the trapezoid rule."""
OTHERS = ("length", "entropy")
"""Mean tokens per held-out response and mean entropy (nats) of the step's tokens, both at the last step."""


@dataclass(frozen=True)
class Outcome:
    """A finished run in the numbers that tables need."""

    curve: list[list[float]]
    """[step, tokens whose loss went through the backward until then, held-out accuracy] of each evaluation."""
    tokens: float
    """Of the whole run."""
    length: float
    seconds: float
    """Spent in steps."""
    entropy: float | None
    """None if no step had tokens to learn from."""
    prompts: list[float]
    """Accuracy of each held-out prompt after the last step."""
    problems: str | None
    """Fingerprint of the held-out problems; None in files of an older version."""


def read_outcome(trial: Trial) -> Outcome:
    """From the run's folder."""
    folder = trial.recipe.run_folder
    metrics = read_steps(folder)
    curve, done = [], 0.0
    for row in metrics:
        done += number(row, "update/tokens") or 0.0
        if (value := number(row, "eval/accuracy")) is not None:
            curve.append([row["step"], done, value])
    lengths, entropies = (known_values(metrics, key) for key in ("eval/response_length", "entropy/mean"))
    last = json.loads((folder / "evaluations" / f"step_{int(curve[-1][0]):06d}.json").read_text())
    return Outcome(
        curve=curve,
        tokens=done,
        length=lengths[-1],
        seconds=sum(known_values(metrics, "time/step")),
        entropy=entropies[-1] if entropies else None,
        prompts=last["accuracies"],
        problems=last.get("problems"),
    )


OutcomeOf = Callable[[Trial], Outcome]


@dataclass(frozen=True)
class Measured:
    """What is compared of a finished run."""

    trial: Trial
    values: dict[str, float]
    """ACCURACIES, OTHERS, "seconds" and "tokens"; no entropy if no step had tokens to learn from."""
    prompts: np.ndarray
    """Accuracy of each held-out prompt after the last step, float64."""
    problems: str | None


def measure(trial: Trial, outcome: Outcome, tokens: float | None = None) -> Measured:
    """tokens: measure the curve over the tokens learned from, up to this number, rather than over all steps."""
    steps, learned_by, accuracies = np.array(outcome.curve, np.float64).T
    places = steps
    if tokens is not None:
        last = np.interp(tokens, learned_by, accuracies)
        within = learned_by < tokens
        places, accuracies = np.append(learned_by[within], tokens), np.append(accuracies[within], last)
    values = {
        "end": accuracies[-1],
        "best": accuracies.max(),
        "area": np.trapezoid(accuracies, places) / (places[-1] - places[0]),
        "length": outcome.length,
        "seconds": outcome.seconds,
        "tokens": outcome.tokens if tokens is None else tokens,
    }
    if outcome.entropy is not None:
        values["entropy"] = outcome.entropy
    numbers = {name: float(value) for name, value in values.items()}
    return Measured(trial, numbers, np.array(outcome.prompts, np.float64), outcome.problems)


def summarise(
    options: AblationOptions,
    trials: Sequence[Trial],
    failed: Mapping[Trial, str],
    tuning: list[dict[str, Any]] | None = None,
    outcome_of: OutcomeOf = read_outcome,
) -> Results:
    """Write `ablation.json` in the ablation's folder, and return its contents.

    {"files" (the recipes'), "overrides", "seeds", "file" (this one), "common", "budget", "grid", "tuning_seeds", "tuning" (as returned by
    `grid.choose`), "recipes": [{"recipe", "runs": [{"seed", "folder", the values of `Measured`}], each value's {"mean", "sd"} over seeds}],
    "comparisons": [{"recipe", "against", each of ACCURACIES: {"seeds": `Paired` and "holm"}, "end" also: {"prompts": `Paired`}}], "failed":
    [{"recipe", "seed", "why"}]}.

    A pair is one seed, or one held-out prompt with its accuracies averaged over the seeds. "holm" is p adjusted for the number of recipes.
    Under `common: tokens` curves are measured up to "budget", the tokens with a loss that every run has had, and prompts, which are known
    only at a run's end, are not compared. A recipe without a finished run appears only in "failed"; one that shares no seed with the first
    is not compared. Raises RecipeError if the runs were not evaluated on the same prompts.
    """
    runs: dict[str, dict[int, Measured]] = {}
    finished = {trial: outcome_of(trial) for trial in trials if trial not in failed}
    budget = min((outcome.tokens for outcome in finished.values()), default=0.0) if options.common == "tokens" else None
    if budget == 0.0 and finished:
        raise RecipeError("--common is tokens, but a run has learned from none, or is of a version that did not count: use updates")
    for trial, outcome in finished.items():
        runs.setdefault(trial.name, {})[trial.seed] = measure(trial, outcome, budget)
    _check_alike([one for of_recipe in runs.values() for one in of_recipe.values()])
    reference = Path(options.recipes[0]).stem
    compared = [name for name in runs if name != reference and runs[name].keys() & runs.get(reference, {}).keys()]
    file = Path(options.out) / "ablation.json"
    results = {
        "files": list(options.recipes),
        "overrides": list(options.overrides),
        "seeds": list(options.seeds),
        "file": str(file),
        "common": options.common,
        "budget": budget,
        "grid": list(options.grid),
        "tuning_seeds": list(options.tuning_seeds),
        "tuning": tuning or [],
        "recipes": [_recipe(name, measured) for name, measured in runs.items()],
        "comparisons": _corrected(
            [{"recipe": name, "against": reference, **_compare(runs[name], runs[reference], budget is None)} for name in compared]
        ),
        "failed": [{"recipe": trial.name, "seed": trial.seed, "why": why} for trial, why in failed.items()],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
    return results


def _check_alike(measured: Sequence[Measured]) -> None:
    for one in measured[1:]:
        if len(one.prompts) != len(measured[0].prompts):
            both = (f"{str(run.trial.recipe.run_folder)!r} answered {len(run.prompts)} held-out prompts" for run in (measured[0], one))
            raise RecipeError(f"data.eval has changed between runs: {' and '.join(both)}; delete one, or choose another --out")
        if one.problems != measured[0].problems:
            runs = " and ".join(repr(str(run.trial.recipe.run_folder)) for run in (measured[0], one))
            raise RecipeError(f"data.eval has changed between runs: {runs} answered different prompts; delete one, or choose another --out")


def _recipe(name: str, measured: Mapping[int, Measured]) -> dict[str, Any]:
    rows = [{"seed": seed, "folder": str(one.trial.recipe.run_folder), **one.values} for seed, one in measured.items()]
    spreads = {
        key: asdict(spread([one.values[key] for one in measured.values() if key in one.values]))
        for key in (*ACCURACIES, *OTHERS, "seconds")
    }
    return {"recipe": name, "runs": rows, **spreads}


def _corrected(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With Holm's adjusted p beside each p over seeds; each measure's comparisons are a family."""
    for name in ACCURACIES:
        found = [comparison[name]["seeds"] for comparison in comparisons]
        for one, adjusted in zip(found, holm([one["p"] for one in found]), strict=True):
            one["holm"] = adjusted
    return comparisons


def _compare(ours: Mapping[int, Measured], theirs: Mapping[int, Measured], prompts: bool) -> dict[str, Any]:
    """Ours minus theirs, over the common seeds."""
    seeds = [seed for seed in ours if seed in theirs]
    result = {
        name: {"seeds": asdict(paired([ours[seed].values[name] - theirs[seed].values[name] for seed in seeds]))} for name in ACCURACIES
    }
    if not prompts:
        return result
    differences = np.mean([ours[seed].prompts - theirs[seed].prompts for seed in seeds], axis=0)
    result["end"]["prompts"] = asdict(paired(differences.tolist()))
    return result
