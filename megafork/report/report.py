"""report.html: a run's report on one self-contained page.

Each section is a function from the data read to HTML; a section without data is "" and omitted.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megafork import __version__
from megafork.report import figures, numbers, page
from megafork.report.charts import ENTROPY, LEARNING, MACHINE, UPDATES, draw, draw_phases, known_values, number
from megafork.report.entropy import entropy_histogram, entropy_summary
from megafork.report.responses import choose_rows, legend_html, response_html
from megafork.report.summary import headline, run_name, setting, warnings
from megafork.run_folder import (
    Metrics,
    open_rollouts,
    read_entropies,
    read_operators,
    read_recipe,
    read_rows,
    read_steps,
    rollout_files,
    step_of,
)

MOST_ENTROPIES = 2_000_000
"""Tokens behind the histogram."""

PERCENTILES = ("mean", "p50", "p80", "p95")


def write_report(run_folder: Path, path: Path | None = None, *, refresh: float | None = None) -> Path:
    """Write a run's page to `path`, by default `report.html` in its folder, and return the path. Sections without data are omitted.

    `refresh`: seconds after which an open page reloads. Raises RecipeError, in one line, for a folder without metrics or with a damaged
    file. The page is replaced atomically.
    """
    return page.write(path or run_folder / "report.html", report_html(run_folder, refresh))


def report_html(run_folder: Path, refresh: float | None = None) -> str:
    metrics, recipe = read_steps(run_folder), read_recipe(run_folder)
    distribution, responses = _rollouts(run_folder, metrics)
    return page.page(
        f"{run_name(recipe, run_folder)} · megafork",
        header=_header(metrics, recipe, run_folder),
        sections=[
            ("Learning", page.charts(draw(metrics, LEARNING))),
            ("Entropy", page.charts(draw(metrics, ENTROPY))),
            ("Where the forks are", distribution),
            ("Responses", responses),
            ("Updates", page.charts(draw(metrics, UPDATES))),
            ("Time and machine", page.charts([*draw_phases(metrics), *draw(metrics, MACHINE)])),
            ("Operators", _operators(run_folder)),
            ("Numbers", _last_numbers(metrics)),
            ("Recipe", _recipe(recipe)),
        ],
        footer=f"Written by megafork {escape(__version__)} from metrics.jsonl, recipe.yaml and rollouts/ in the run's folder.",
        refresh=refresh,
    )


def _header(metrics: list[Metrics], recipe: dict[str, Any], folder: Path) -> str:
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in warnings(metrics, recipe))
    return (
        f'<p class="eyebrow">mega<i>fork</i> run report</p><h1>{escape(run_name(recipe, folder))}</h1>'
        f'<p class="lead">{escape(_summary(metrics, recipe))}</p>{page.numbers_row(headline(metrics))}{notes}'
    )


def _summary(metrics: list[Metrics], recipe: dict[str, Any]) -> str:
    """One or two sentences: which model was trained, how, and for how long."""
    model, done, planned = setting(recipe, "model", "path"), metrics[-1]["step"], setting(recipe, "train", "steps")
    supervised = bool(known_values(metrics, "loss/sft"))
    words = ["/".join(Path(str(model)).parts[-2:]) if model else "A model", f"trained for {done:,} steps"]
    if isinstance(planned, int) and planned != done:
        words[-1] = f"trained for {done:,} of {planned:,} steps"
    words.append("on target texts" if supervised else _selection(recipe))
    sizes = [(name, setting(recipe, "parallel", name)) for name in ("tp", "pp", "cp")]
    layout = ", ".join(f"{name.upper()} {size}" for name, size in sizes if isinstance(size, int) and size > 1)
    sentence = " ".join(word for word in words if word) + (f", with {layout}." if layout else ".")
    prompts, samples = setting(recipe, "rollout", "prompts"), setting(recipe, "rollout", "samples")
    return sentence if supervised or not (prompts and samples) else f"{sentence} {prompts} prompts per step, with {samples} responses each."


def _selection(recipe: dict[str, Any]) -> str:
    select, rho = setting(recipe, "forks", "select"), setting(recipe, "forks", "top_entropy_quantile")
    share = numbers.short_percent(rho) if isinstance(rho, float | int) else "a share"
    return {
        "top": f"on the {share} of response tokens with the highest entropy",
        "bottom": f"on the {share} of response tokens with the lowest entropy",
        "random": f"on a random {share} of response tokens",
        "all": "on all response tokens",
    }.get(str(select), "")


def _rollouts(run_folder: Path, metrics: list[Metrics]) -> tuple[str, str]:
    """The histogram and the coloured responses of the last roll-out file, "" for each without data.

    Files of steps beyond the metrics were left by a killed run and will be overwritten.
    """
    files = [file for file in rollout_files(run_folder) if step_of(file) <= metrics[-1]["step"]]
    if not files:
        return "", ""
    path = files[-1]
    step = step_of(path)
    with open_rollouts(path) as file:
        entropies, mask = read_entropies(file, at_most=MOST_ENTROPIES)
        groups = [read_rows(file, rows) for rows in choose_rows(file)]
    tau = next((number(row, "forks/tau") for row in metrics if row["step"] == step), None)
    return _distribution(entropies, mask, tau, step), _responses(groups, step)


def _distribution(entropies: np.ndarray, mask: np.ndarray, tau: float | None, step: int) -> str:
    if not entropies.size:
        return ""
    summary = entropy_summary(entropies)
    total = int(summary["tokens"] or 0)
    note = f"{total:,} response tokens of step {step}, on a log scale."
    svg = figures.histogram(f"Histogram of token entropies, step {step}", entropy_histogram(entropies, mask, tau=tau), tau=tau)
    drawing = page.figure("Entropy of the tokens", note, svg, [("blue", "all tokens"), ("orange", "selected")])
    cuts = sorted({0.0, 0.01, 0.05, *([tau] if tau is not None and tau > 0.05 else [])})
    names = [f"{low:.3g} to {high:.3g} nats" for low, high in pairwise(cuts)]
    names = [names[0].replace("0 to", "under"), *names[1:], f"{cuts[-1]:.3g} nats and more" + (" (τ)" if tau == cuts[-1] else "")]
    counts = [int(((entropies >= low) & (entropies < high)).sum()) for low, high in zip(cuts, [*cuts[1:], float("inf")], strict=True)]
    parts = [(style, name, n / total) for style, name, n in zip(("grey", "sky", "blue", "orange"), names, counts, strict=False)]
    facts = page.table(["nats", *PERCENTILES], [["entropy", *(numbers.plain(summary[key]) for key in PERCENTILES)]])
    shares = page.figure("How much there was to choose", "Share of the response tokens by entropy.", page.share_strip(parts) + facts)
    return page.charts([drawing, shares])


def _responses(groups: list[list[dict[str, Any]]], step: int) -> str:
    blocks = []
    for rows in groups:
        pair = "".join(response_html(row) for row in rows)
        blocks.append(f'<div class="group"><p class="prompt">{escape(rows[0]["prompt"])}</p><div class="pair">{pair}</div></div>')
    if not blocks:
        return ""
    note = (
        f"From step {step}: a right and a wrong answer to the same prompt, if there are both. The stronger the tint, the less certain the "
        "model was about the next token; the update learned from the underlined tokens. Hover over a token, or Tab to an underlined one, "
        "for its numbers."
    )
    return f"<p>{note}</p>{legend_html()}{''.join(blocks)}"


def _operators(run_folder: Path) -> str:
    """Of each step that was profiled."""
    parts = []
    for step, rows in read_operators(run_folder).items():
        cells = [[row["name"], f"{row['calls']:,}", numbers.plain(row["seconds"]), numbers.percent(row["share"])] for row in rows]
        trace = f"profile/step_{step:06d}.trace.json.gz"
        note = f"The most expensive of step {step} on rank 0, each without those that it calls. {trace} shows all."
        parts.append(f"<p>{note}</p>{page.table(['operator', 'calls', 'seconds', 'share'], cells)}")
    return "".join(parts)


def _last_numbers(metrics: list[Metrics]) -> str:
    rows = []
    for key in sorted({key for row in metrics for key in row} - {"step"}):
        known = known_values(metrics, key)
        if known:
            rows.append([key, *(numbers.plain(value) for value in (known[0], known[-1], min(known), max(known)))])
    return page.table(["metric", "first", "last", "lowest", "highest"], rows) if rows else ""


def _recipe(recipe: dict[str, Any]) -> str:
    lines = []
    for section, values in recipe.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        lines += [f"{section}.{key} = {value}" for key, value in pairs]
    return page.details("Every setting of the run", f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>') if lines else ""
