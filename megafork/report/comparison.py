"""comparison.html: several runs on one page, with one figure per metric and the settings in which the runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megafork import __version__
from megafork.recipe import RecipeError
from megafork.report import figures, numbers, page
from megafork.report.charts import ENTROPY, LEARNING, MACHINE, PHASES, UPDATES, Chart, Curve, known_values, number
from megafork.report.summary import headline, run_name, warnings
from megafork.run_folder import Metrics, read_recipe, read_steps

STYLES = ("blue", "orange", "green", "violet", "sand", "sky", "ink", "grey")
"""One style per run, in the order given."""
_OWN_TO_EACH = ("run.name", "run.folder")


@dataclass(frozen=True)
class Run:
    """One of the runs; `letter` and `style` identify it in the figures."""

    letter: str
    style: str
    name: str
    metrics: list[Metrics]
    recipe: dict[str, Any]


def write_comparison(folders: Sequence[Path], path: Path | None = None, *, refresh: float | None = None) -> Path:
    """Write the page of these runs to `path`, by default `comparison.html` next to the first, and return the path.

    `refresh`: seconds after which an open page reloads. Raises RecipeError, in one line, for more runs than there are colours, a run given
    twice, or one that cannot be read.
    """
    runs = read_runs(folders)
    names = ", ".join(run.name for run in runs)
    text = page.page(
        f"{names} · megafork",
        header=_header(runs),
        sections=[
            ("What differs in the recipes", _differences(runs)),
            ("Learning", page.charts(_draw(runs, LEARNING))),
            ("Entropy", page.charts(_draw(runs, ENTROPY))),
            ("Updates", page.charts(_draw(runs, UPDATES))),
            ("Time and machine", page.charts(_draw(runs, MACHINE)) + _phases(runs)),
        ],
        footer=f"Written by megafork {escape(__version__)} from metrics.jsonl and recipe.yaml in the folders of the runs.",
        refresh=refresh,
    )
    return page.write(path or folders[0].resolve().parent / "comparison.html", text)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs, in the order given. Runs with the same name are labelled by their folders."""
    if len(folders) > len(STYLES):
        raise RecipeError(f"RUN is given {len(folders)} times: a page compares at most {len(STYLES)} runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RecipeError(f"RUN is {', '.join(map(str, folders))}: a run is given twice, give each once")
    recipes = [read_recipe(folder) for folder in folders]
    names = [run_name(recipe, folder) for recipe, folder in zip(recipes, folders, strict=True)]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    read = [read_steps(folder) for folder in folders]
    return [Run(*parts) for parts in zip(ascii_uppercase, STYLES, names, read, recipes, strict=False)]


def _header(runs: list[Run]) -> str:
    notes = [f"{run.letter}: {note}" for run in runs for note in warnings(run.metrics, run.recipe)]
    warned = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
    return f'<p class="eyebrow">mega<i>fork</i> comparison</p><h1>{len(runs)} runs</h1>{page.legend(_key(runs))}{_numbers(runs)}{warned}'


def _key(runs: list[Run]) -> list[tuple[str, str]]:
    return [(run.style, f"{run.letter} {run.name}") for run in runs]


def _numbers(runs: list[Run]) -> str:
    """The headline numbers of the runs' own reports, side by side."""
    columns = [{label: value for label, value, _ in headline(run.metrics)} for run in runs]
    steps = ["steps", *(f"{run.metrics[-1]['step']:,}" for run in runs)]
    labels = dict.fromkeys(label for column in columns for label in column)
    return _by_run(runs, [steps, *([label, *(column.get(label, numbers.MISSING) for column in columns)] for label in labels)])


def _by_run(runs: list[Run], rows: Sequence[Sequence[str]]) -> str:
    return page.table(["", *(f"{run.letter} {run.name}" for run in runs)], rows)


def _draw(runs: list[Run], charts: Sequence[Chart]) -> list[str]:
    """A card for each metric of the charts that any run has."""
    return [card for chart in charts for curve in chart.curves if (card := _card(runs, chart, curve))]


def _card(runs: list[Run], chart: Chart, curve: Curve) -> str:
    values = {run.letter: {row["step"]: number(row, curve.key) for row in run.metrics if curve.key in row} for run in runs}
    steps = sorted({step for column in values.values() for step in column})
    if not steps:
        return ""
    heading = chart.heading if len(chart.curves) == 1 else f"{chart.heading}: {curve.name}"
    series = [figures.Series(run.letter, [values[run.letter].get(step) for step in steps], run.style, curve.dots) for run in runs]
    label = f"{heading} of {len(runs)} runs over steps {steps[0]} to {steps[-1]}"
    svg = figures.line_chart(label, steps, series, form=chart.form, axis=chart.axis, log=chart.log)
    return page.figure(heading, chart.note if len(chart.curves) == 1 else "", svg, _key(runs)) if svg else ""


def _phases(runs: list[Run]) -> str:
    rows = []
    for name in (*(name for name, _ in PHASES), "step"):
        known = [known_values(run.metrics, f"time/{name}") for run in runs]
        if any(known):
            rows.append([name, *(numbers.seconds(sum(column) / len(column)) if column else numbers.MISSING for column in known)])
    return page.figure("Where a step's time goes", "Mean over all steps, by phase.", _by_run(runs, rows)) if rows else ""


def _differences(runs: list[Run]) -> str:
    flat = [_flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in _OWN_TO_EACH)
    rows = [[key, *(settings.get(key, numbers.MISSING) for settings in flat)] for key in keys if len({s.get(key) for s in flat}) > 1]
    return _by_run(runs, rows) if rows else "<p>Nothing but their names.</p>" if keys else ""


def _flat(recipe: dict[str, Any]) -> dict[str, str]:
    """section.key -> its value as text."""
    sections = {section: values if isinstance(values, dict) else {"": values} for section, values in recipe.items()}
    pairs = [(f"{section}.{key}", value) for section, values in sections.items() for key, value in values.items()]
    return {name: "empty" if value is None else str(value) for name, value in pairs}
