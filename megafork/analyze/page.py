"""report.html of an analysis: one offline page in the style of a run's report."""

from __future__ import annotations

import itertools
from html import escape
from typing import Any

from megafork import __version__
from megafork.analyze.inputs import AnalysisInputs
from megafork.analyze.responses import read_lists, read_responses
from megafork.analyze.statistics import CURVE, Results
from megafork.report import figures, numbers, page
from megafork.report.entropy import Histogram
from megafork.report.responses import MOST_TOKENS, legend_html, tokens_html

_STYLES = ("blue", "orange", "green", "violet", "sand", "sky", "ink", "grey")
_SHOWN = 30
"""Tokens per list."""


def write_page(inputs: AnalysisInputs, results: Results) -> None:
    """Write `report.html`, replacing it atomically."""
    own = results["entropies"][results["labels"][-1]]
    text = page.page(
        f"Entropy of {results['model']} · megafork",
        header=_header(results, own),
        sections=[
            ("Where the forks are", page.charts([_histogram(results, own), _shares(own)])),
            ("Which tokens fork", _vocabulary(results["vocabulary"], results["min_count"])),
            ("From checkpoint to checkpoint", _models(results)),
            ("Responses", _responses(inputs, own["threshold"])),
        ],
        footer=f"Written by megafork {escape(__version__)} from analysis.json and the parquet files next to it.",
    )
    page.write(inputs.folder / "report.html", text)


def _header(results: Results, own: dict[str, Any]) -> str:
    p80 = own["percentiles"][80]
    headline = page.numbers_row(
        [
            ("80th percentile, nats", numbers.plain(p80), "in the paper: 0.672"),
            ("under 0.01 nats", numbers.percent(own["share_below_0.01"]), "in the paper: 50.6%"),
            ("share of all entropy in the top 20%", numbers.percent(own["top_share"][20]), ""),
            ("mean, nats", numbers.plain(own["mean"]), ""),
        ]
    )
    lead = (
        f"{results['tokens']:,} tokens of {results['responses']:,} responses to {results['prompts']}, sampled and scored at temperature "
        f"{results['temperature']:g}."
    )
    return (
        f'<p class="eyebrow">mega<i>fork</i> entropy analysis</p><h1>{escape(results["model"])}</h1>'
        f'<p class="lead">{escape(lead)}</p>{headline}'
    )


def _histogram(results: Results, own: dict[str, Any]) -> str:
    note = f"{results['tokens']:,} tokens, on a log scale; the top {numbers.short_percent(results['rho'])} are selected."
    svg = figures.histogram("Histogram of token entropies", Histogram(**own["histogram"]), tau=own["threshold"])
    return page.figure("Entropy of the tokens", note, svg, [("blue", "all tokens"), ("orange", "selected")])


def _shares(own: dict[str, Any]) -> str:
    series = [figures.Series("share", own["top_share"], "orange")]
    svg = figures.line_chart(
        "Share of all entropy", list(range(101)), series, form=numbers.percent, axis=numbers.short_percent, unit="top %"
    )
    return page.figure("How concentrated entropy is", "Share of the sum of all entropies in the top x% of the tokens.", svg)


def _vocabulary(words: dict[str, Any], least: int) -> str:
    note = f"{words['seen']:,} different tokens occur, {words['frequent']:,} of them at least {least:,} times. tokens.parquet lists all."
    if not words["frequent"]:
        return f"<p>{escape(note)}</p>"
    lists = []
    for kind in ("highest", "lowest"):
        rows = [[repr(row["token"]), numbers.plain(row["mean"]), f"{row['count']:,}"] for row in words[kind][:_SHOWN]]
        lists.append(page.figure(f"{kind.capitalize()} mean entropy", "Of frequent tokens.", page.table(["token", "nats", "times"], rows)))
    return f"<p>{escape(note)}</p>{page.charts(lists)}"


def _models(results: Results) -> str:
    labels = results["labels"]
    if len(labels) < 2:
        return ""
    percentiles = [
        figures.Series(f"p{p}", [results["entropies"][label]["percentiles"][p] for label in labels], style, dots=True)
        for p, style in zip(reversed(CURVE[3:]), _STYLES, strict=False)
    ]
    curves = figures.line_chart("Entropy percentiles", list(range(len(labels))), percentiles, unit="model")
    order = "Nats; models in order: " + ", ".join(f"{n} {label}" for n, label in enumerate(labels)) + "."
    base = results["change"]["base"]
    bins = list(range(5, 101, 5))
    changes = [
        figures.Series(label, results["change"]["means"][label], style)
        for label, style in zip(labels[1:][-len(_STYLES) :], _STYLES, strict=False)
    ]
    moved = figures.line_chart("Change of entropy", bins, changes, unit=f"% of {base}")
    charts = [
        page.figure("Percentiles of the entropy", order, curves),
        page.figure("Where entropy changed", f"Mean change in nats, in bins of 5% of {base}'s entropies, lowest first.", moved),
        _matrix(
            labels, results["overlap"]["pooled"], "Overlap, pooled", f"Of the top {numbers.short_percent(results['rho'])} of all tokens."
        ),
        _matrix(labels, results["overlap"]["per_response"], "Overlap, per response", "Within each response; mean over responses."),
    ]
    return page.charts(charts)


def _matrix(labels: list[str], values: list[list[float]], heading: str, note: str) -> str:
    rows = [[f"{n} {label}", *map(numbers.percent, row)] for n, (label, row) in enumerate(zip(labels, values, strict=True))]
    return page.figure(heading, note, page.table(["", *map(str, range(len(labels)))], rows))


def _responses(inputs: AnalysisInputs, threshold: float, count: int = 3) -> str:
    """The first responses, token by token."""
    label = next(reversed(inputs.models))
    rows = next(read_responses(inputs))[:count]
    columns = {name: next(read_lists(inputs.entropies(label), name)) for name in ("entropies", "log_probs")}
    blocks = []
    for place, row in enumerate(rows):
        values = {}
        for name, (flat, ends) in columns.items():
            start, end = [0, *ends.tolist()][place : place + 2]
            values[name] = flat[start:end].tolist()
        ids = row["tokens"][:MOST_TOKENS]
        shown = {**values, "pieces": inputs.tokenizer.pieces(ids), "mask": [h >= threshold for h in values["entropies"]], "advantage": None}
        cut = {name: value if value is None else list(itertools.islice(value, len(ids))) for name, value in shown.items()}
        blocks.append(
            f'<div class="group"><p class="prompt">{escape(inputs.tokenizer.decode(row["prompt_tokens"]))}</p>'
            f'<article class="response"><p class="tokens" dir="auto">{tokens_html(cut)}</p></article></div>'
        )
    return f"{legend_html()}{''.join(blocks)}"
