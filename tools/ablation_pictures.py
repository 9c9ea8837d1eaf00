"""docs/ablation/rules.svg and sizes.svg: the pictures of docs/ablation.md, from the recorded runs beside them."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megafork.ablate.record import Record
from megafork.ablate.statistics import paired, spread

STYLE = {
    "svg.hashsalt": "megafork",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}
FOLDER = Path(__file__).resolve().parent.parent / "docs/ablation"
TASKS = {"countdown": ("countdown.json", "rules.json"), "walks": ("walk.json", "walk-rules.json")}
SIZES = {0.3: "small.json", 1.1: "countdown.json"}
"""Millions of parameters."""
RULES = ("all", "random_20_weighted", "prefix_50", "bottom_80", "gmts", "gradient", "covariance", "rsi", "stapo", "rest_20")
COLOURS = {"top_20": "#d9661f", "all": "#2f6db3", "random_20_weighted": "#7a7a7a", "bottom_80": "#3a9a6b"}
BASELINE = "top_20"

Ends = dict[str, dict[int, float]]
"""Held-out accuracy after the last step, in %, by recipe and seed."""


def ends(name: str) -> Ends:
    """Of the compared runs: a tuning seed has several for a recipe, with a learning rate each."""
    by_run: dict[tuple[str, int], list[float]] = {}
    for run in Record(FOLDER / name).runs:
        by_run.setdefault((run.recipe, run.seed), []).append(100 * run.outcome.curve[-1][2])
    found: Ends = {}
    for (recipe, seed), accuracies in by_run.items():
        if len(accuracies) == 1:
            found.setdefault(recipe, {})[seed] = accuracies[0]
    return found


def differences(found: Ends) -> dict[str, list[float]]:
    """From the baseline, in points, seed by seed, of every other recipe."""
    return {recipe: [seeds[s] - found[BASELINE][s] for s in seeds] for recipe, seeds in found.items() if recipe != BASELINE}


def bar(panel: Axes, place: float, values: list[float], colour: str, *, across: bool) -> None:
    """The mean of the differences with its 95% interval, and each of them as a dot; `across`: horizontally."""
    test = paired(values)
    assert test.low is not None and test.high is not None
    for x, style in (
        (values, {"marker": ".", "linestyle": "", "alpha": 0.4}),
        ([test.low, test.high], {"linewidth": 2.0}),
        ([test.mean], {"marker": "o"}),
    ):
        line = (x, [place] * len(x)) if across else ([place] * len(x), x)
        panel.plot(*line, color=colour, **style)


def draw_rules() -> None:
    """Each rule's difference from the baseline, on each task."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for panel, (task, names) in zip(panels, TASKS.items(), strict=True):
        measured = {rule: values for name in names for rule, values in differences(ends(name)).items()}
        for place, rule in enumerate(RULES):
            bar(panel, place, measured[rule], COLOURS.get(rule, "#333333"), across=True)
        panel.set_yticks(range(len(RULES)), RULES)
        panel.axvline(0, color=COLOURS[BASELINE], linewidth=1)
        panel.set(title=task, xlabel=f"minus {BASELINE} at the end, points")
    panels[0].invert_yaxis()
    figure.savefig(FOLDER / "rules.svg", metadata={"Date": None})


def draw_sizes() -> None:
    """Accuracy at the end, and its difference from the baseline, over the model's size."""
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, name in enumerate(SIZES.values()):
        found = ends(name)
        for recipe, colour in COLOURS.items():
            seeds = list(found[recipe].values())
            left.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.4)
            left.plot([place], [spread(seeds).mean], "o", color=colour, label=None if place else recipe)
        for recipe, values in differences(found).items():
            bar(right, place, values, COLOURS[recipe], across=False)
    right.axhline(0, color=COLOURS[BASELINE], linewidth=1)
    for panel, title in ((left, "held-out accuracy at the end, %"), (right, f"minus {BASELINE}, points")):
        panel.set_title(title)
        panel.set_xticks(range(len(SIZES)), [f"{size} million" for size in SIZES])
        panel.set_xlim(-0.5, len(SIZES) - 0.5)
        panel.set_xlabel("parameters")
    left.set_ylim(0, None)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(FOLDER / "sizes.svg", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams.update(STYLE)
    draw_rules()
    draw_sizes()
