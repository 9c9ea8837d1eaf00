"""The report's figures over the steps: a table with one entry per figure, which names the metrics it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megafork.report import figures, numbers, page
from megafork.run_folder import Metrics


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
        "Share of correct responses: each step's roll-outs, and the held-out prompts.",
        (Curve("accuracy/mean", "training", "blue"), Curve("eval/accuracy", "held out", "ink", dots=True)),
        form=numbers.percent,
        axis=numbers.short_percent,
    ),
    Chart(
        "Response length",
        "Mean number of tokens per response.",
        (Curve("response_length/mean", "training", "blue"), Curve("eval/response_length", "held out", "ink", dots=True)),
    ),
    Chart("Supervised loss", "Mean negative log-prob of the target tokens, in nats.", (Curve("loss/sft", "loss", "blue"),)),
)
ENTROPY = (
    Chart(
        "Entropy",
        "Nats per token: mean of all response tokens, their 80th percentile, and mean of the forks.",
        (Curve("entropy/mean", "all", "blue"), Curve("entropy/p80", "p80", "violet"), Curve("entropy/forks", "forks", "orange")),
    ),
    Chart("Threshold τ", "The entropy in nats that separates the selected tokens from the others.", (Curve("forks/tau", "τ", "orange"),)),
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
    Chart("Throughput", "Tokens per second over the whole step.", (Curve("throughput/tokens_per_s", "tokens/s", "blue"),)),
    Chart("Memory", "Peak of the largest rank, GB.", (Curve("memory/peak_gb", "GB", "blue"),)),
    Chart(
        "Roll-out mismatch",
        "Difference between the roll-out engine's and the trainer's log-probs for the same tokens, and the forks it changes (log scale).",
        (
            Curve("rollout_mismatch/max", "largest", "orange"),
            Curve("rollout_mismatch/kl", "KL", "blue"),
            Curve("rollout_mismatch/mask", "share of forks", "green"),
        ),
        log=True,
    ),
)
PHASES = (("rollout", "blue"), ("reward", "sky"), ("score", "sand"), ("update", "orange"), ("refit", "green"))


def draw(metrics: list[Metrics], charts: Sequence[Chart]) -> list[str]:
    """The charts as cards, omitting those without values."""
    drawn = []
    for chart in charts:
        curves = [curve for curve in chart.curves if known_values(metrics, curve.key)]
        rows = [row for row in metrics if any(curve.key in row for curve in curves)]
        series = [figures.Series(c.name, [number(row, c.key) for row in rows], c.style, c.dots) for c in curves]
        if rows:
            steps = [row["step"] for row in rows]
            label = f"{chart.heading} over steps {steps[0]} to {steps[-1]}"
            svg = figures.line_chart(label, steps, series, form=chart.form, axis=chart.axis, log=chart.log)
            if svg:
                drawn.append(page.figure(chart.heading, chart.note, svg))
    return drawn


def draw_phases(metrics: list[Metrics]) -> list[str]:
    """The card of each step's time by phase, if there are any."""
    rows = [row for row in metrics if any(number(row, f"time/{name}") is not None for name, _ in PHASES)]
    series = [figures.Series(name, [number(row, f"time/{name}") for row in rows], style) for name, style in PHASES]
    rest = [max(0.0, (number(row, "time/step") or 0.0) - sum(number(row, f"time/{name}") or 0.0 for name, _ in PHASES)) for row in rows]
    series.append(figures.Series("other", rest, "grey"))
    series = [s for s in series if any(s.values)]
    if not series:
        return []
    means = [sum(v or 0.0 for v in s.values) / len(rows) for s in series]
    key = [(s.style, f"{s.name} {numbers.seconds(mean)} ({mean / sum(means):.0%})") for s, mean in zip(series, means, strict=True)]
    svg = figures.stacked_bars("Time of each step by phase", [row["step"] for row in rows], series)
    return [page.figure("Where a step's time goes", "Seconds by phase; the key gives the means.", svg, key)]


def number(row: Metrics, key: str) -> float | None:
    """The metric as a finite float, or None if the line has none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf") else None


def known_values(metrics: list[Metrics], key: str) -> list[float]:
    """The metric's values at the steps that have it."""
    return [value for row in metrics if (value := number(row, key)) is not None]
