"""Number formats for the report, the live line and tables. A missing number is an en dash."""

from __future__ import annotations

MISSING = "\N{EN DASH}"


def plain(value: float | None) -> str:
    """Three significant digits: 0.672, 12.3, 1,234, 4.1e-6."""
    if value is None:
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return _power(f"{value:.1e}")
    if size < 0.9995:
        return f"{value:.3f}"
    if size < 9.995:
        return f"{value:.2f}"
    if size < 99.95:
        return f"{value:.1f}"
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal: 0.613 -> 61.3%."""
    return MISSING if value is None else f"{100 * value:.1f}%"


def short(value: float | None) -> str:
    """At most five characters for an axis: 950, 3.2k, 18M, 0.25, 1e-5."""
    if value is None:
        return MISSING
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return _power(f"{value:.0e}") if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def short_percent(value: float | None) -> str:
    """A percentage for an axis, without needless decimals: 0.25 -> 25%."""
    return MISSING if value is None else f"{100 * value:.3g}%"


def seconds(value: float | None) -> str:
    """A short time: 0.12s, 3.4s, 128s."""
    if value is None:
        return MISSING
    return f"{value:.2f}s" if value < 0.995 else f"{value:.1f}s" if value < 99.5 else f"{value:.0f}s"


def duration(value: float | None) -> str:
    """A long time in its two largest units: 42s, 3m 05s, 2h 10m, 4d 03h."""
    if value is None:
        return MISSING
    whole = round(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _power(text: str) -> str:
    """4.1e-06 -> 4.1e-6."""
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"
