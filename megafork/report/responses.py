"""Responses as HTML: every token tinted by its entropy, the selected ones (forks) underlined, and each token's numbers in a tooltip.

Tints change at fixed entropies, so that reports can be compared by eye. The text content of the markup is the response itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import pyarrow.parquet as parquet

from megafork.report import numbers

TINTS = (0.05, 0.2, 0.5, 1.0, 1.5)
"""Entropies in nats at which the tint gets stronger: class h0 below the first, h5 from the last one up."""

MOST_TOKENS = 800
"""Tokens shown per response."""

Row = dict[str, Any]
"""One response as read from rollouts/step_*.parquet."""


def choose_rows(file: parquet.ParquetFile, *, prompts: int = 3, each: int = 1) -> list[list[int]]:
    """Row indices to show, one list per prompt: of prompts with right and wrong responses, the first `each` of both, right ones first.

    Prompts closest to half right come first. Prompts without contrast are shown only if no prompt has any.
    """
    table = file.read(columns=["prompt_index", "accuracy"]).to_pydict()
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(table["prompt_index"]):
        groups.setdefault(prompt, []).append(index)

    def right(index: int) -> bool:
        return (table["accuracy"][index] or 0) >= 0.5

    def imbalance(rows: list[int]) -> float:
        return abs(sum(map(right, rows)) / len(rows) - 0.5)

    mixed = sorted((rows for rows in groups.values() if imbalance(rows) < 0.5), key=imbalance)
    if mixed:
        return [[row for side in (True, False) for row in [r for r in rows if right(r) is side][:each]] for rows in mixed[:prompts]]
    return [rows[: 2 * each] for rows in list(groups.values())[:prompts]]


def response_html(row: Row) -> str:
    """One response as an <article>: the verdict, a line of numbers, and its tokens."""
    right = (row["accuracy"] or 0) >= 0.5
    length, forks = len(row["tokens"]), sum(row["mask"])
    facts = [f"{length:,} tokens", f"{forks:,} selected", f"advantage {_signed(row['advantage'])}"]
    if row["reward"] is not None and row["reward"] != row["accuracy"]:
        facts.append(f"reward {numbers.plain(row['reward'])}")
    if row["truncated"]:
        facts.append("cut off at the length limit")
    verdict = '<b class="right">✓ right</b>' if right else '<b class="wrong">✗ wrong</b>'
    more = f'<p class="quiet">… {length - MOST_TOKENS:,} more tokens</p>' if length > MOST_TOKENS else ""
    return (
        f'<article class="response"><p class="facts">{verdict} <span>{" · ".join(facts)}</span></p>'
        f'<p class="tokens" dir="auto">{tokens_html(row)}</p>{more}</article>'
    )


def tokens_html(row: Row) -> str:
    """The response's first tokens, one <span> each. Tab moves to forks, a tap to any token; both show the tooltip's text."""
    columns = (row["pieces"], row["entropies"], row["log_probs"], row["mask"])
    return "".join(_token(*token, row["advantage"]) for token in list(zip(*columns, strict=True))[:MOST_TOKENS])


def legend_html() -> str:
    """The legend: the scale of tints and the mark of a fork."""
    names = [f"< {TINTS[0]}", *(f"{low} to {high}" for low, high in pairwise(TINTS)), f"≥ {TINTS[-1]}"]
    tints = "".join(f'<span class="h{level}">{name}</span>' for level, name in enumerate(names))
    return f'<p class="scale"><span>entropy, nats</span>{tints}<span class="fork">selected</span></p>'


def _token(piece: str, entropy: float | None, log_prob: float | None, fork: bool, advantage: float | None) -> str:
    probability = None if log_prob is None else math.exp(min(log_prob, 0.0))
    facts = [
        repr(piece),
        f"entropy {numbers.plain(entropy)} nats",
        f"probability {numbers.plain(probability)}",
        f"advantage {_signed(advantage)}",
        "selected" if fork else "not selected",
    ]
    level = sum((entropy or 0.0) >= tint for tint in TINTS)
    kinds = {"fork": fork, "blank": not piece.strip(), "line": "\n" in piece}
    classes = [f"h{level}", *(name for name, holds in kinds.items() if holds)]
    order = 0 if fork else -1
    return f'<span class="{" ".join(classes)}" tabindex="{order}" title="{_attribute(facts)}">{escape(piece)}</span>'


def _attribute(lines: Sequence[str]) -> str:
    return escape("\n".join(lines)).replace("\n", "&#10;")


def _signed(value: float | None) -> str:
    return numbers.MISSING if value is None else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
