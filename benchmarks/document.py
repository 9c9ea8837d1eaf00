"""Write docs/benchmarks.md from the results, so that no figure is typed by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/benchmarks.md"
_INTRODUCTION = """# Benchmarks

Written by `make bench` from `benchmarks/results/*.json`; a test fails if page and results disagree. The peers run their own code,
unmodified, from the package registry, in the same processes on the same inputs. A ratio is the peer's value divided by ours (above 1: ours
is less), the median over neighbouring repeats; a spread is the minimum and maximum over all repeats. "target" is the ratio to reach.
"""


def write(results: Path, names: tuple[str, ...]) -> None:
    PAGE.write_text(render(results, names))


def render(results: Path, names: tuple[str, ...]) -> str:
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in names if (results / f"{name}.json").exists()}
    return "\n".join([_INTRODUCTION, *(_section(name, result) for name, result in found.items())])


def _section(name: str, result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    on = f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['gpu'] or 'no GPU'}"
    where = f"{on}, load {machine['load_at_start'][0]} at the start"
    pinned = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = [f"## {name}", "", str(importlib.import_module(f"benchmarks.{name}").__doc__).strip(), ""]
    lines += ["| what | ours | peer | ratio | target | |", "|---|---|---|---|---|---|"]
    lines += [_row(figure) for figure in result["figures"]]
    return "\n".join([*lines, "", f"`{result['command']}` on {where}; {pinned}.", ""])


def _row(figure: dict[str, Any]) -> str:
    ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.3g}"
    aim = "" if figure["at_least"] is None else f"{figure['at_least']:g}"
    notes = [figure["note"], *(f"{name} {value:,.4g}" for name, value in figure.get("extra", {}).items())]
    cells = [figure["what"], _cell(figure["ours"], figure["unit"]), _cell(figure["peer"], figure["unit"]), ratio, aim]
    return "| " + " | ".join([*cells, ", ".join(filter(None, notes))]) + " |"


def _cell(series: dict[str, Any] | None, unit: str) -> str:
    if series is None:
        return ""
    spread = f" ({series['min']:.3g} to {series['max']:.3g})" if series["repeats"] > 1 else ""
    return f"{series['name']}: {series['median']:.3g} {unit}{spread}"
