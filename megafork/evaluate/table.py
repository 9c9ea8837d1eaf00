"""The results of an evaluation as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def results_table(results: dict[str, Any]) -> Table:
    """One row per benchmark and decoding of `judge_responses`' results: n problems, metrics in per cent with their 95% intervals over
    problems, mean length in tokens, and the share of responses that were cut off."""
    rows = results["results"]
    accuracies = [name for name in rows[0] if "@" in name]
    several = len({row["decoding"] for row in rows}) > 1
    table = Table(title=None if several else rows[0]["decoding"], title_justify="left", box=None, pad_edge=False)
    for name in [*(["decoding"] if several else []), "benchmark"]:
        table.add_column(name)
    for name in ["n", *accuracies, "length", "cut"]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["decoding"]] if several else []
        cells += [row["benchmark"], str(row["problems"]), *(_share(row[name]) for name in accuracies)]
        table.add_row(*cells, f"{row['length']['mean']:,.0f}", f"{row['truncated']['mean']:.1%}")
    return table


def _share(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.2f} ({100 * value['low']:.0f}-{100 * value['high']:.0f})"
