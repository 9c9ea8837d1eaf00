"""report.html: what a run did, on one page that needs nothing else.

Each section is a function from what was read to HTML; one without data gives "" and is left out. A figure over the steps is one line
in the tables below.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from megafork import __version__
from megafork.analysis import figures, numbers, page
from megafork.analysis.entropy import entropy_histogram, entropy_summary
from megafork.analysis.responses import choose_rows, legend_html, response_html, visible
from megafork.analysis.run_folder import (
    Metrics,
    open_rollouts,
    read_entropies,
    read_metrics,
    read_recipe,
    read_rows,
    rollout_files,
    step_of,
)
from megafork.recipe import RecipeError

MOST_ENTROPIES = 2_000_000
"""Tokens behind the histogram."""


@dataclass(frozen=True)
class Curve:
    key: str
    name: str
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    heading: str
    note: str
    curves: tuple[Curve, ...]
    form: figures.Format = numbers.plain
    axis: figures.Format = numbers.short
    log: bool = False


LEARNING = (
    Chart(
        "Accuracy",
        "Share of right responses: each step's roll-outs, and the held-out prompts.",
        (Curve("accuracy/mean", "training", "blue"), Curve("eval/accuracy", "held out", "ink", dots=True)),
        form=numbers.percent,
        axis=numbers.short_percent,
    ),
    Chart(
        "Response length",
        "Mean number of tokens in a response.",
        (Curve("response_length/mean", "training", "blue"), Curve("eval/response_length", "held out", "ink", dots=True)),
    ),
    Chart("Supervised loss", "Mean negative log-prob of the target tokens, in nats.", (Curve("loss/sft", "loss", "blue"),)),
)
ENTROPY = (
    Chart(
        "Entropy",
        "Nats a token: mean of all response tokens, their 80th percentile, and mean of the forks.",
        (Curve("entropy/mean", "all", "blue"), Curve("entropy/p80", "p80", "violet"), Curve("entropy/forks", "forks", "orange")),
    ),
    Chart("Threshold τ", "The entropy in nats that parts the selected tokens from the others.", (Curve("forks/tau", "τ", "orange"),)),
)
UPDATES = (
    Chart("Gradient norm", "Before clipping.", (Curve("grad_norm", "norm", "blue"),)),
    Chart(
        "Clipped tokens",
        "Share of the trained tokens whose ratio left the clip range.",
        (Curve("loss/clip_fraction", "clipped", "blue"),),
        form=numbers.percent,
        axis=numbers.short_percent,
    ),
)
MACHINE = (
    Chart("Throughput", "Tokens a second over the whole step.", (Curve("throughput/tokens_per_s", "tokens/s", "blue"),)),
    Chart("Memory", "Peak of the largest rank, GB.", (Curve("memory/peak_gb", "GB", "blue"),)),
    Chart(
        "Roll-out mismatch",
        "How far the roll-out engine's log-probs lie from the trainer's for the same tokens (log scale).",
        (Curve("rollout_mismatch/max", "largest", "orange"), Curve("rollout_mismatch/kl", "KL", "blue")),
        log=True,
    ),
)
PHASES = (("rollout", "blue"), ("reward", "sky"), ("score", "sand"), ("update", "orange"), ("refit", "green"))


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Any part that the run has not written is left out.

    Raises RecipeError, in one line, for a folder without metrics or with a damaged file. The page is replaced in one piece.
    """
    path = run_folder / "report.html"
    text = report_html(run_folder)
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(text, encoding="utf-8", errors="replace")
    os.replace(unfinished, path)
    return path


def report_html(run_folder: Path) -> str:
    metrics, recipe = read_metrics(run_folder / "metrics.jsonl"), read_recipe(run_folder)
    if not metrics:
        raise RecipeError(f"{str(run_folder / 'metrics.jsonl')!r} holds no whole line: there is no step to report")
    distribution, responses = _rollouts(run_folder, metrics)
    return page.page(
        f"{_name(recipe, run_folder)} · megafork",
        header=_header(metrics, recipe, run_folder),
        sections=[
            ("Learning", _charts(metrics, LEARNING)),
            ("Entropy", _charts(metrics, ENTROPY)),
            ("Where the forks are", distribution),
            ("Responses", responses),
            ("Updates", _charts(metrics, UPDATES)),
            ("Time and machine", page.charts([*_phases(metrics), *_figures(metrics, MACHINE)])),
            ("Numbers", _last_numbers(metrics)),
            ("Recipe", _recipe(recipe)),
        ],
        footer=f"Written by megafork {escape(__version__)} from metrics.jsonl, recipe.yaml and rollouts/ in the run's folder.",
    )


def _header(metrics: list[Metrics], recipe: dict[str, Any], folder: Path) -> str:
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in _warnings(metrics, recipe))
    return (
        f'<p class="eyebrow">mega<i>fork</i> run report</p><h1>{escape(_name(recipe, folder))}</h1>'
        f'<p class="lead">{escape(_summary(metrics, recipe))}</p>{page.numbers_row(_headline(metrics))}{notes}'
    )


def _name(recipe: dict[str, Any], folder: Path) -> str:
    return str(_get(recipe, "run", "name") or folder.resolve().name)


def _summary(metrics: list[Metrics], recipe: dict[str, Any]) -> str:
    """One or two sentences: which model, trained how, for how long."""
    model, done, planned = _get(recipe, "model", "path"), metrics[-1]["step"], _get(recipe, "train", "steps")
    supervised = bool(_values(metrics, "loss/sft"))
    words = ["/".join(Path(str(model)).parts[-2:]) if model else "A model", f"trained for {done:,} steps"]
    if isinstance(planned, int) and planned != done:
        words[-1] = f"trained for {done:,} of {planned:,} steps"
    words.append("on target texts" if supervised else _selection(recipe))
    sizes = [(name, _get(recipe, "parallel", name)) for name in ("tp", "pp", "cp")]
    layout = ", ".join(f"{name.upper()} {size}" for name, size in sizes if isinstance(size, int) and size > 1)
    sentence = " ".join(word for word in words if word) + (f", with {layout}." if layout else ".")
    prompts, samples = _get(recipe, "rollout", "prompts"), _get(recipe, "rollout", "samples")
    return sentence if supervised or not (prompts and samples) else f"{sentence} A step is {prompts} prompts with {samples} responses each."


def _selection(recipe: dict[str, Any]) -> str:
    select, rho = _get(recipe, "forks", "select"), _get(recipe, "forks", "top_entropy_quantile")
    share = numbers.short_percent(rho) if isinstance(rho, float | int) else "a share"
    return {
        "top": f"on the {share} of response tokens with the highest entropy",
        "bottom": f"on the {share} of response tokens with the lowest entropy",
        "random": f"on a random {share} of response tokens",
        "all": "on all response tokens",
    }.get(str(select), "")


def _headline(metrics: list[Metrics]) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the numbers at the top; what was measured before and after comes first, and the first says when."""
    items: list[tuple[str, str, str]] = []
    for key, label, form in (
        ("eval/accuracy", "held-out accuracy", numbers.percent),
        ("accuracy/mean", "training accuracy", numbers.percent),
        ("loss/sft", "supervised loss", numbers.plain),
        ("entropy/mean", "mean entropy, nats", numbers.plain),
        ("forks/tau", "threshold τ, nats", numbers.plain),
    ):
        known = [(row["step"], value) for row in metrics if (value := _number(row, key)) is not None]
        if known:
            (first, before), (last, after) = known[0], known[-1]
            remark = "" if items else f"step {first:,} → step {last:,}" if first != last else f"step {last:,}"
            items.append((label, form(before) if first == last else f"{form(before)} → {form(after)}", remark))
    speeds, times, memory = (sorted(_values(metrics, key)) for key in ("throughput/tokens_per_s", "time/step", "memory/peak_gb"))
    if speeds:
        items.append(("tokens/s, median", numbers.plain(speeds[len(speeds) // 2]), ""))
    if times:
        items.append(("time in steps", numbers.duration(sum(times)), ""))
    if memory:
        items.append(("peak memory", f"{numbers.plain(memory[-1])} GB", ""))
    return items


def _warnings(metrics: list[Metrics], recipe: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting the curves."""
    notes = []
    planned = _get(recipe, "train", "steps")
    if isinstance(planned, int) and metrics[-1]["step"] < planned:
        notes.append(f"The run has written {metrics[-1]['step']:,} of its {planned:,} steps.")
    errors = sum(_values(metrics, "reward/errors"))
    if errors:
        notes.append(f"Verdicts that failed or ran out of time, each scored 0: {errors:,.0f}.")
    return notes


def _charts(metrics: list[Metrics], charts: Sequence[Chart]) -> str:
    return page.charts(_figures(metrics, charts))


def _figures(metrics: list[Metrics], charts: Sequence[Chart]) -> list[str]:
    drawn = []
    for chart in charts:
        curves = [curve for curve in chart.curves if _values(metrics, curve.key)]
        rows = [row for row in metrics if any(_number(row, curve.key) is not None for curve in curves)]
        series = [figures.Series(c.name, [_number(row, c.key) for row in rows], c.style, c.dots) for c in curves]
        if rows:
            steps = [row["step"] for row in rows]
            label = f"{chart.heading} over steps {steps[0]} to {steps[-1]}"
            svg = figures.line_chart(label, steps, series, form=chart.form, axis=chart.axis, log=chart.log)
            if svg:
                drawn.append(page.figure(chart.heading, chart.note, svg))
    return drawn


def _phases(metrics: list[Metrics]) -> list[str]:
    rows = [row for row in metrics if any(_number(row, f"time/{name}") is not None for name, _ in PHASES)]
    series = [figures.Series(name, [_number(row, f"time/{name}") for row in rows], style) for name, style in PHASES]
    rest = [max(0.0, (_number(row, "time/step") or 0.0) - sum(_number(row, f"time/{name}") or 0.0 for name, _ in PHASES)) for row in rows]
    series.append(figures.Series("other", rest, "grey"))
    series = [s for s in series if any(s.values)]
    if not series:
        return []
    means = [sum(v or 0.0 for v in s.values) / len(rows) for s in series]
    key = [(s.style, f"{s.name} {numbers.seconds(mean)} ({mean / sum(means):.0%})") for s, mean in zip(series, means, strict=True)]
    svg = figures.stacked_bars("Time of each step by phase", [row["step"] for row in rows], series)
    return [page.figure("Where a step's time goes", "Seconds by phase; the key gives the means.", svg, key)]


def _rollouts(run_folder: Path, metrics: list[Metrics]) -> tuple[str, str]:
    """The histogram and the coloured responses of the last roll-out file, "" for each that it cannot fill."""
    files = rollout_files(run_folder)
    if not files:
        return "", ""
    path = files[-1]
    step = step_of(path)
    with open_rollouts(path) as file:
        entropies, mask = read_entropies(file, at_most=MOST_ENTROPIES)
        groups = [list(read_rows(file, rows)) for rows in choose_rows(file)]
    tau = next((_number(row, "forks/tau") for row in metrics if row["step"] == step), None)
    return _distribution(entropies, mask, tau, step), _responses(groups, step)


def _distribution(entropies: Any, mask: Any, tau: float | None, step: int) -> str:
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
    facts = table_of(summary)
    shares = page.figure("How much there was to choose", "Share of the response tokens by entropy.", page.share_strip(parts) + facts)
    return page.charts([drawing, shares])


def table_of(summary: dict[str, float | int | None]) -> str:
    """The entropy summary as a table of one row."""
    keys = ("mean", "p50", "p80", "p95")
    return page.table(["nats", *keys], [["entropy", *(numbers.plain(summary[key]) for key in keys)]])


def _responses(groups: list[list[dict[str, Any]]], step: int) -> str:
    blocks = []
    for rows in groups:
        pair = "".join(response_html(row) for row in rows)
        blocks.append(f'<div class="group"><p class="prompt">{escape(visible(rows[0]["prompt"]))}</p><div class="pair">{pair}</div></div>')
    if not blocks:
        return ""
    note = (
        f"From step {step}: the same prompt answered rightly and wrongly where there are both. The stronger the tint, the less certain the "
        "model was of what comes next; underlined tokens are those that the update learned from. Point at a token, or reach an underlined "
        "one with Tab, for its numbers."
    )
    return f"<p>{note}</p>{legend_html()}{''.join(blocks)}"


def _last_numbers(metrics: list[Metrics]) -> str:
    keys = sorted({key for row in metrics for key in row if key != "step" and _values([row], key)})
    rows = []
    for key in keys:
        known = [(row["step"], value) for row in metrics if (value := _number(row, key)) is not None]
        values = [value for _, value in known]
        rows.append([key, *(numbers.plain(v) for v in (values[0], values[-1], min(values), max(values))), f"{known[-1][0]:,}"])
    return page.table(["metric", "first", "last", "lowest", "highest", "last step"], rows) if rows else ""


def _recipe(recipe: dict[str, Any]) -> str:
    lines = []
    for section, values in recipe.items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        lines += [f"{section}.{key} = {value}" for key, value in pairs]
    return page.details("Every setting of the run", f'<pre tabindex="0">{escape(visible(chr(10).join(lines)))}</pre>') if lines else ""


def _get(recipe: dict[str, Any], section: str, key: str) -> Any:
    values = recipe.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _number(row: Metrics, key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf") else None


def _values(metrics: list[Metrics], key: str) -> list[float]:
    return [value for row in metrics if (value := _number(row, key)) is not None]
