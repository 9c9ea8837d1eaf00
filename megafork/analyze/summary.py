"""The main numbers of an analysis for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table

from megafork.analyze.statistics import Results
from megafork.report import numbers


def summary(results: Results) -> Group:
    """One row per model: mean and percentiles in nats, share under 0.01, share of the top 20%, and overlap with the last model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for name in ("mean", "p50", "p80", "p95", "< 0.01", "in top 20%", "overlap"):
        table.add_column(name, justify="right")
    for place, label in enumerate(results["labels"]):
        one = results["entropies"][label]
        nats = [numbers.plain(value) for value in (one["mean"], *(one["percentiles"][p] for p in (50, 80, 95)))]
        shares = (one["share_below_0.01"], one["top_share"][20], results["overlap"]["pooled"][place][-1])
        table.add_row(label, *nats, *map(numbers.percent, shares))
    words = [f"{results['tokens']:,} tokens of {results['responses']:,} responses"]
    for kind in ("highest", "lowest"):
        tokens = ", ".join(repr(row["token"]) for row in results["vocabulary"][kind][:10])
        words += [f"{kind} mean entropy: {tokens}"] if tokens else []
    return Group(table, *words, f"report: {Path(results['out']) / 'report.html'}")
