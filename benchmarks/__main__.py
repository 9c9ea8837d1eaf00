"""Run the benchmarks, print their table and write `benchmarks/results/<name>.json`."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import document, machine, peers
from benchmarks.figure import Figure, Series
from megafork.compat import noise

NAMES = ("threshold", "head_memory", "head_time", "update_head", "kernels", "layouts", "refit", "planning", "dealing", "step", "scoring")
RESULTS = Path(__file__).with_name("results")


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of: {', '.join(NAMES)}. Unset: all.")] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes, to check that everything runs; the figures mean nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.", show_default=False)] = RESULTS,
) -> None:
    """megafork against its peers: the same inputs, the same ranks, their own code (installed into .venv-peers on the first call)."""
    if unknown := set(names or ()) - set(NAMES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: give some of {', '.join(NAMES)}")
    os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # per rank; the ranks share the cores
    os.environ["KINETO_LOG_LEVEL"] = "99"
    console = Console(width=max(Console().width, 160))
    torch.set_num_threads(1)
    noise.silence()
    warnings.simplefilter("ignore", FutureWarning)
    peers.install()
    out.mkdir(parents=True, exist_ok=True)
    for name in names or NAMES:
        context = {"command": f"python -m benchmarks {name}{' --quick' if quick else ''}", "machine": machine.describe()}
        figures = importlib.import_module(f"benchmarks.{name}").run(quick)
        result = {**context, "versions": machine.versions(), "figures": [figure.summary() for figure in figures]}
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        console.print(_table(name, figures))
    if out == RESULTS and not quick:
        document.write(RESULTS, NAMES)


def _table(name: str, figures: list[Figure]) -> Table:
    title = f"{name} (less is better; median (min-max); ratio (of rank 0's processor seconds))"
    table = Table("what", "ours", "peer", "ratio", "at least", "note", title=title)
    for figure in figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        if figure.cpu_ratio is not None:
            ratio += f" ({figure.cpu_ratio:.2f})"
        bound = "" if figure.at_least is None else f"{figure.at_least:g}"
        table.add_row(figure.what, _cell(figure.ours, figure.unit), _cell(figure.peer, figure.unit), ratio, bound, escape(_note(figure)))
    return table


def _note(figure: Figure) -> str:
    return ", ".join([*filter(None, [figure.note]), *(f"{name} {value:,.4g}" for name, value in figure.extra.items())])


def _cell(series: Series | None, unit: str) -> str:
    if series is None:
        return ""
    of = series.summary()
    spread = f" ({of['min']:.4g}-{of['max']:.4g})" if of["repeats"] > 1 else ""
    return f"{series.name}: {of['median']:.4g} {unit}{spread}"


if __name__ == "__main__":
    typer.run(main)
