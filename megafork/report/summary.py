"""A run in a few numbers and words, for the headers of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megafork.report import numbers
from megafork.report.charts import known_values, number
from megafork.run_folder import Metrics


def setting(recipe: dict[str, Any], section: str, key: str) -> Any:
    """A key's value, None if the recipe does not have it."""
    values = recipe.get(section)
    return values.get(key) if isinstance(values, dict) else None


def run_name(recipe: dict[str, Any], folder: Path) -> str:
    """The run's name in the recipe, else the folder's."""
    return str(setting(recipe, "run", "name") or folder.resolve().name)


def headline(metrics: list[Metrics]) -> list[tuple[str, str, str]]:
    """(label, value, remark) of the headline numbers: first those with a value before and after, the very first with its steps."""
    items: list[tuple[str, str, str]] = []
    for key, label, form in (
        ("eval/accuracy", "held-out accuracy", numbers.percent),
        ("accuracy/mean", "training accuracy", numbers.percent),
        ("loss/sft", "supervised loss", numbers.plain),
        ("entropy/mean", "mean entropy, nats", numbers.plain),
        ("forks/tau", "threshold τ, nats", numbers.plain),
    ):
        known = [(row["step"], value) for row in metrics if (value := number(row, key)) is not None]
        if known:
            (first, before), (last, after) = known[0], known[-1]
            remark = "" if items else f"step {first:,} → step {last:,}" if first != last else f"step {last:,}"
            items.append((label, form(before) if first == last else f"{form(before)} → {form(after)}", remark))
    speeds, times, memory = (sorted(known_values(metrics, key)) for key in ("throughput/tokens_per_s", "time/step", "memory/peak_gb"))
    if speeds:
        items.append(("tokens/s, median", numbers.plain(speeds[len(speeds) // 2]), ""))
    if times:
        items.append(("time in steps", numbers.duration(sum(times)), ""))
    if memory:
        items.append(("peak memory", f"{numbers.plain(memory[-1])} GB", ""))
    return items


def warnings(metrics: list[Metrics], recipe: dict[str, Any]) -> list[str]:
    """Caveats that a reader should know before trusting the curves."""
    notes = []
    planned = setting(recipe, "train", "steps")
    if isinstance(planned, int) and metrics[-1]["step"] < planned:
        notes.append(f"The run has written {metrics[-1]['step']:,} of its {planned:,} steps.")
    errors = sum(known_values(metrics, "reward/errors"))
    if errors:
        notes.append(f"Verdicts that failed or ran out of time, each scored 0: {errors:,.0f}.")
    return notes
