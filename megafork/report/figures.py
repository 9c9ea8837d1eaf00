"""Figures as inline SVG, by pure functions from numbers to a string. Colours and fonts come from the page's style sheet by class name.

A figure is 400 units wide, so that its text is legible both two per row on a desktop and alone on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from megafork.report import numbers
from megafork.report.entropy import Histogram

Format = Callable[[float | None], str]

WIDTH, HEIGHT = 400, 220
LEFT, TOP, BOTTOM = 42, 14, 30
LETTER = 5.9  # mean width of a letter in a label, to reserve room for it
MOST_POINTS = 400  # per curve: one per unit of width
MOST_BANDS = 120  # hover bands per figure


@dataclass(frozen=True)
class Series:
    """One curve: a value or None per step. `dots` marks a sparse series: its points are drawn and joined across gaps."""

    name: str
    values: Sequence[float | None]
    style: str
    dots: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps a value in [low, high] to a coordinate in [start, end], linearly or logarithmically. An empty range maps to the middle."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        if high == low:
            return (self.start + self.end) / 2
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) whose range covers [low, high]. `whole`: integers inside it."""
    span = high - low
    if span <= 0:
        return [low] if whole else [low, low + 1]
    rough = span / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        gap = max(1.0, round(gap))
        return [gap * i for i in range(math.ceil(low / gap), math.floor(high / gap) + 1)]
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [gap * i for i in range(first, last + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """The powers of ten around [low, high]; every other one, and so on, when there are more than six."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    gap = math.ceil((last - first) / 5)
    return [10.0**power for power in range(first, last + gap, gap)]


def line_chart(
    label: str,
    steps: Sequence[int],
    series: Sequence[Series],
    *,
    form: Format = numbers.plain,
    axis: Format = numbers.short,
    log: bool = False,
    unit: str = "step",
) -> str:
    """Curves over the steps (ascending), each labelled at its right end. `form` formats values in tooltips, `axis` those on the y axis;
    `unit` is the unit of the x axis.

    The y axis starts at 0 unless values are negative or `log` is set, which drops values that are not positive.
    """
    if log:
        series = [Series(s.name, [v if v is not None and v > 0 else None for v in s.values], s.style, s.dots) for s in series]
    known = [v for s in series for v in s.values if v is not None]
    if not known:
        return ""
    marks = decade_ticks(min(known), max(known)) if log else nice_ticks(min(0.0, *known), max(0.0, *known))
    right = max(48.0, 14 + LETTER * max(len(s.name) for s in series))
    x = Scale(steps[0], steps[-1], LEFT, WIDTH - right)
    y = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP, log)
    curves = [_curve(steps, s, x, y) for s in series]
    parts = [_frame(x, y, marks, axis, unit), *curves, _names(series, x, y), _bands(steps, series, x, y, form, unit)]
    return _svg(label, parts)


def stacked_bars(label: str, steps: Sequence[int], series: Sequence[Series], *, form: Format = numbers.seconds) -> str:
    """One bar per step, its parts stacked in the order of `series`; None counts as 0. Beyond 60 bars, neighbouring steps are averaged."""
    per_bar = max(1, math.ceil(len(steps) / 60))
    starts = range(0, len(steps), per_bar)
    heights = [[_mean(s.values[i : i + per_bar]) for s in series] for i in starts]
    top = max((sum(bar) for bar in heights), default=0.0)
    if top <= 0:
        return ""
    marks = nice_ticks(0.0, top)
    gap = (WIDTH - 48 - LEFT) / len(starts)
    y = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    ends = [(steps[i], steps[min(i + per_bar, len(steps)) - 1]) for i in starts]
    x = Scale(ends[0][0], ends[-1][0], LEFT + gap / 2, WIDTH - 48 - gap / 2)
    parts = [_frame(x, y, marks, numbers.short)]
    for place, (bar, (first, last)) in enumerate(zip(heights, ends, strict=True)):
        name = f"step {first}" if first == last else f"steps {first} to {last}, mean"
        lines = [name, *(f"{s.name} {form(h)}" for s, h in zip(series, bar, strict=True))]
        parts.append(f'<g class="bar">{_title(lines)}')
        below = 0.0
        for s, height in zip(series, bar, strict=True):
            if height > 0:
                box = (LEFT + place * gap + gap * 0.12, y(below + height), gap * 0.76, y(below) - y(below + height))
                parts.append(f'<rect class="{s.style}" {_box(*box)}/>')
                below += height
        parts.append("</g>")
    return _svg(label, parts)


def histogram(label: str, bins: Histogram, *, tau: float | None) -> str:
    """Token counts (log scale) over entropy in nats, the selected tokens in front of all tokens, and `tau` as a dashed line."""
    top = max(bins.counts, default=0)
    if not top:
        return ""
    marks = decade_ticks(1, top)
    x = Scale(bins.edges[0], bins.edges[-1], LEFT, WIDTH - 14)
    y = Scale(0.7, marks[-1], HEIGHT - BOTTOM, TOP, log=True)  # a count of 1 is visible above the axis
    parts = [_grid(y, marks, numbers.short)]
    for tick in nice_ticks(x.low, x.high, 6):
        if x(tick) < x.end - 36:  # leaves room for the unit at the end
            parts.append(f'<text class="x" x="{x(tick):.1f}" y="{HEIGHT - 12}">{numbers.short(tick)}</text>')
    parts.append(f'<text class="unit" x="{WIDTH - 14}" y="{HEIGHT - 12}" text-anchor="end">nats</text>')
    total = sum(bins.counts)
    for low, high, count, chosen in zip(bins.edges, bins.edges[1:], bins.counts, bins.selected, strict=False):
        if not count:
            continue
        words = [f"{low:.2f} to {high:.2f} nats", f"{count:,} tokens ({numbers.percent(count / total)})", f"{chosen:,} selected"]
        parts.append(f'<g class="bar">{_title(words)}<rect class="blue" {_column(x, y, low, high, count)}/>')
        if chosen:
            parts.append(f'<rect class="orange" {_column(x, y, low, high, chosen)}/>')
        parts.append("</g>")
    if tau is not None and x.low <= tau <= x.high:
        side, anchor = (6, "start") if x(tau) < WIDTH * 0.7 else (-6, "end")
        parts.append(f'<line class="tau" x1="{x(tau):.2f}" x2="{x(tau):.2f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="name" x="{x(tau) + side:.1f}" y="{TOP + 6}" text-anchor="{anchor}">τ {numbers.plain(tau)}</text>')
    return _svg(label, parts)


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _frame(x: Scale, y: Scale, marks: Sequence[float], form: Format, unit: str = "step") -> str:
    parts = [_grid(y, marks, form, x.end)]
    for tick in nice_ticks(x.low, x.high, 6, whole=True):
        parts.append(f'<text class="x" x="{x(tick):.1f}" y="{HEIGHT - 12}">{numbers.short(tick)}</text>')
    parts.append(f'<text class="unit" x="{x.end + 16:.1f}" y="{HEIGHT - 12}">{escape(unit)}</text>')
    return "".join(parts)


def _grid(y: Scale, marks: Sequence[float], form: Format, end: float = WIDTH - 14) -> str:
    parts = []
    for mark in marks:
        kind = "base" if mark == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{end:.1f}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(mark):.1f}">{form(mark)}</text>')
    return "".join(parts)


def _curve(steps: Sequence[int], series: Series, x: Scale, y: Scale) -> str:
    parts = []
    for points in _runs(steps, series):
        shown = _thin(points)
        line = " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in shown)
        parts.append(f'<polyline class="{series.style}" data-series="{escape(series.name)}" points="{line}"/>')
        if len(points) == 1 or (series.dots and len(points) <= 60):
            parts += [f'<circle class="{series.style}" cx="{x(step):.2f}" cy="{y(value):.2f}" r="3"/>' for step, value in shown]
    return "".join(parts)


def _runs(steps: Sequence[int], series: Series) -> list[list[tuple[int, float]]]:
    """The known points, split at missing values unless the series is sparse."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(steps, series.values, strict=True):
        if value is not None:
            runs[-1].append((step, value))
        elif not series.dots:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS points: the lowest and the highest of each group of neighbours, so that no spike is lost, and first and last."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / (MOST_POINTS - 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        near = range(start, min(start + size, len(points)))
        kept |= {min(near, key=lambda i: points[i][1]), max(near, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _names(series: Sequence[Series], x: Scale, y: Scale) -> str:
    """Each curve's name next to its last value; names that would overlap are moved apart."""
    last = [(next(v for v in reversed(s.values) if v is not None), s) for s in series if any(v is not None for v in s.values)]
    parts, free = [], HEIGHT - BOTTOM - 2.0
    room = {id(s): place for place, (_, s) in enumerate(sorted(last, key=lambda item: -item[0]))}
    for value, s in sorted(last, key=lambda item: item[0]):
        at = max(min(y(value), free), TOP + 13 * room[id(s)])
        parts.append(f'<text class="name {s.style}" x="{x.end + 8:.1f}" y="{at:.1f}">{escape(s.name)}</text>')
        free = at - 13
    return "".join(parts)


def _bands(steps: Sequence[int], series: Sequence[Series], x: Scale, y: Scale, form: Format, unit: str) -> str:
    """Invisible bands, one per step shown, that show a cursor, dots and a tooltip on hover."""
    stride = math.ceil(len(steps) / MOST_BANDS)
    shown = sorted({*range(0, len(steps), stride), len(steps) - 1})
    half = (x.end - x.start) / max(len(shown) - 1, 1) / 2
    parts = []
    for i in shown:
        here = [(s, value) for s in series if (value := s.values[i]) is not None]
        if not here:
            continue
        at = x(steps[i])
        dots = "".join(f'<circle class="{s.style}" cx="{at:.2f}" cy="{y(v):.2f}" r="3.5"/>' for s, v in here)
        title = _title([f"{unit} {steps[i]}", *(f"{s.name} {form(v)}" for s, v in here)])
        line = f'<line x1="{at:.2f}" x2="{at:.2f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        parts.append(f'<g class="at">{title}<rect {_box(at - half, TOP, 2 * half, HEIGHT - TOP - BOTTOM)}/>{line}{dots}</g>')
    return "".join(parts)


def _column(x: Scale, y: Scale, low: float, high: float, count: int) -> str:
    return _box(x(low) + 0.5, y(count), x(high) - x(low) - 1, y.start - y(count))


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.5):.2f}" height="{height:.2f}"'


def _title(lines: Sequence[str]) -> str:
    return f"<title>{escape(chr(10).join(lines))}</title>"


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else 0.0
