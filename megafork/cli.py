"""The `megafork` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from megafork.recipe import RecipeError
from megafork.recipe_file import load_recipe

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: one YAML file that says all of a run.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable last line.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Reinforcement learning at the forking tokens: sample, score, update, refit; then a report."""
    _run("train", recipe, overrides, as_json)


@app.command()
def sft(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Supervised training on prompt-response rows, by the same Megatron stack."""
    _run("sft", recipe, overrides, as_json)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False) -> None:
    """Write RUN/report.html again."""
    from megafork.analysis.report import write_report

    if not (run / "metrics.jsonl").exists():
        raise RecipeError(f"RUN is {str(run)!r}: it has no metrics.jsonl; give a run folder such as runs/quickstart")
    page = write_report(run)
    console.print(f"report: {page}")
    _finish(as_json, report=str(page))


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to check this machine for.")] = None, as_json: Json = False
) -> None:
    """What this machine has, and what each missing part costs."""
    checked = load_recipe(recipe) if recipe else None
    from megafork.doctor import can_run, examine, render

    findings = examine(checked)
    console.print(render(findings))
    runs = can_run(findings)
    _finish(as_json, can_run=runs, findings=[vars(finding) for finding in findings])
    if recipe and not runs:
        raise typer.Exit(1)


def _run(command: Literal["train", "sft"], file: Path, overrides: list[str] | None, as_json: bool) -> None:
    recipe = load_recipe(file, overrides)  # before the imports below, which take a second
    from megafork import launch
    from megafork.analysis.report import write_report
    from megafork.analysis.run_folder import read_metrics

    code = launch.run(command, recipe)
    if code == launch.DONE and launch.is_main():
        folder = recipe.run_folder
        page = write_report(folder) if command == "train" else None
        last = read_metrics(folder / "metrics.jsonl")[-1]
        console.print(f"run: {folder}" + (f"   report: {page}" if page else ""))
        _finish(as_json, run=str(folder), report=str(page) if page else None, **last)
    raise typer.Exit(code)


def _finish(as_json: bool, **values: Any) -> None:
    if as_json:
        typer.echo(json.dumps(values))


def main() -> None:
    """Run the command line. Wrong input is one line on standard error and exit code 2."""
    try:
        app()
    except RecipeError as error:
        typer.echo(f"megafork: {' '.join(str(error).splitlines())}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
