"""The results of an ablation as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from megafork.ablate.results import ACCURACIES

_HEADINGS = ("end", "best", "area", "length", "entropy")


def tables(results: dict[str, Any]) -> Group:
    """Each recipe's means and standard deviations over seeds, then the differences from the first one with their 95% intervals, and failed
    runs. Accuracies in per cent and points, length in tokens, entropy in nats, time in minutes per run."""
    parts: list[Table | str] = [_means(results)]
    if results["tuning"]:
        parts = [_tuning(results), "", *parts]
    if results["budget"] is not None:
        parts.append(f"compared at {results['budget']:,.0f} tokens with a loss")
    if results["comparisons"]:
        parts += ["", _differences(results)]
    parts += [f"failed: {one['recipe']}, seed {one['seed']}: {one['why']}" for one in results["failed"]]
    return Group(*parts)


def _means(results: dict[str, Any]) -> Table:
    table = _table("recipe", "seeds", *_HEADINGS, "min")
    for row in results["recipes"]:
        accuracies = [_spread(row[name], 100, 1) for name in ACCURACIES]
        others = [_spread(row["length"], 1, 1), _spread(row["entropy"], 1, 3), f"{row['seconds']['mean'] / 60:.1f}"]
        table.add_row(row["recipe"], str(len(row["runs"])), *accuracies, *others)
    return table


def _differences(results: dict[str, Any]) -> Table:
    table = _table(f"minus {results['comparisons'][0]['against']}", "of", "over", "difference", "95% interval", "p", "Holm")
    for row in results["comparisons"]:
        pairs = [(name, unit, found) for name in ACCURACIES for unit, found in row[name].items()]
        for place, (name, unit, found) in enumerate(pairs):
            interval = "-" if found["low"] is None else f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
            ps = ["-" if p is None else f"{p:.2g}" for p in (found["p"], found.get("holm"))]
            table.add_row("" if place else row["recipe"], name, f"{found['n']} {unit}", f"{100 * found['mean']:+.1f}", interval, *ps)
    return table


def _tuning(results: dict[str, Any]) -> Table:
    table = _table("tuned", "setting", "seeds", "end", "")
    for row in results["tuning"]:
        mark = "chosen" if row["chosen"] else "" if row["complete"] else "failed"
        table.add_row(row["recipe"], " ".join(row["setting"]), str(len(row["runs"])), _spread(row["end"], 100, 1), mark)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _spread(value: dict[str, Any], scale: float, digits: int) -> str:
    if value["mean"] is None:
        return "-"
    sd = "" if value["sd"] is None else f" ±{scale * value['sd']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{sd}"
