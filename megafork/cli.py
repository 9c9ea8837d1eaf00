"""The `megafork` command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from megafork.analyze.options import AnalysisOptions
from megafork.evaluate.options import EvaluationOptions, decodings
from megafork.files import full_disk
from megafork.options import takes
from megafork.process import Interrupted, die_with_starter, print_anything
from megafork.recipe import RecipeError
from megafork.recipe_file import load_recipe
from megafork.rl.fork_temperature import PAPER_THRESHOLD

if TYPE_CHECKING:
    from megafork.convert.convert import Converted, Tick

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
convert = typer.Typer(no_args_is_help=True, help="Weights from Hugging Face's format to Megatron's, and back.")
app.add_typer(convert, name="convert")
console = Console(highlight=False)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: one YAML file that specifies a whole run.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable last line.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; must not exist.", show_default=False)]
Dtype = Annotated[Literal["keep", "fp32", "bf16"], typer.Option(help="Dtype of the written weights.")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare every tensor and the logits; needs memory for the whole model.")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Reinforcement learning at the forking tokens: sample, score, update, refit; then a report."""
    _run("train", recipe, overrides, as_json)


@app.command()
def sft(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Supervised training on prompt-response rows, with the same Megatron stack."""
    _run("sft", recipe, overrides, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The page. Unset: RUN/report.html, or comparison.html next to the first run.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--watch", metavar="SECONDS", min=0.1, help="Rewrite it at this interval until the last step or Ctrl-C.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a run's report, or write one page that compares several runs."""
    from megafork.report.watch import watch, write_page

    if out is not None and out.is_dir():
        raise RecipeError(f"--out is {str(out)!r}, a folder: give the page's file, such as {str(out / 'report.html')!r}")
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise RecipeError(f"RUN is {str(run)!r}: it has no metrics.jsonl; give a run folder such as runs/quickstart")
    page = write_page(runs, out) if seconds is None else watch(runs, out, seconds=seconds)
    typer.echo(f"report: {page}")
    _finish(as_json, report=str(page))


@app.command(name="eval")
@takes(EvaluationOptions)
def evaluate(
    given: dict[str, Any],
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="1")] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold.")] = 1.0,
    fork_temperature: Annotated[
        tuple[float, float] | None, typer.Option(help="LOW HIGH: HIGH at tokens with entropy above the threshold.", show_default=False)
    ] = None,
    fork_threshold: Annotated[float, typer.Option(help="Entropy in nats; the default is the paper's 80th percentile.")] = PAPER_THRESHOLD,
    sweep: Annotated[bool, typer.Option("--sweep", help="The paper's grid of fork temperatures.")] = False,
    as_json: Json = False,
) -> None:
    """avg@k, pass@k and maj@k on benchmarks, with confidence intervals. Calling it again resumes a killed evaluation."""
    options = EvaluationOptions(**given, decodings=decodings(temperature, top_p, fork_temperature, fork_threshold, sweep))
    from megafork import commands
    from megafork.evaluate.table import results_table

    code, results = commands.evaluate(options)
    if results is not None:
        console.print(results_table(results))
        typer.echo(f"results: {results['file']}")
        _finish(as_json, **results)
    raise typer.Exit(code)


@app.command()
@takes(AnalysisOptions)
def analyze(given: dict[str, Any], as_json: Json = False) -> None:
    """Entropy patterns of a model's responses: which tokens fork, and how that changes over checkpoints."""
    options = AnalysisOptions(**given)
    from megafork import commands
    from megafork.analyze.summary import summary

    code, results = commands.analyze(options)
    if results is not None:
        console.print(summary(results))
        _finish(as_json, **results)
    raise typer.Exit(code)


@app.command()
def ablate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE... [KEY=VALUE...]", help="The others are compared with the first recipe.", show_default=False),
    ],
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, one run of each recipe per seed.")] = "1,2,3",
    out: Annotated[str, typer.Option(help="Folder for the runs and ablation.json.")] = "runs/ablation",
    grid: Annotated[list[str] | None, typer.Option(help="KEY=V1,V2,...: tune each recipe over these values; may be repeated.")] = None,
    tuning_seeds: Annotated[str | None, typer.Option(help="Seeds that choose each recipe's setting; none of --seeds.")] = None,
    common: Annotated[str, typer.Option(help="Compare at equal `updates`, or at equal `tokens` that had a loss.")] = "updates",
    parallel: Annotated[int, typer.Option(metavar="N", help="Runs at once, each in a process of its own.")] = 1,
    record: Annotated[str | None, typer.Option(metavar="FILE", help="Keep finished runs in this small file, and go on from it.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the command of each run that can be trained now; train none.")] = False,
    as_json: Json = False,
) -> None:
    """Train recipes over the same seeds, and tabulate the differences. Calling it again resumes a killed ablation."""
    from megafork.ablate.options import AblationOptions

    options = AblationOptions.parse(arguments, seeds, out, grid or (), tuning_seeds, common, parallel, record)
    from megafork import commands

    if list_only:
        for trial in commands.left_to_train(options):
            typer.echo(shlex.join(["megafork", "train", *trial.arguments]))
        return
    from megafork.ablate.table import tables

    code, results = commands.ablate(options)
    console.print(tables(results))
    typer.echo(f"results: {results['file']}")
    _finish(as_json, **results)
    raise typer.Exit(code)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe to check this machine for.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """What this machine has, what each missing part costs, and whether a recipe can run here."""
    checked = load_recipe(recipe, overrides) if recipe else None
    from megafork import commands
    from megafork.doctor import can_run, examine, of_inputs, render

    findings = examine(checked)
    if checked and can_run(findings) and commands.is_here(checked):
        findings.append(of_inputs(commands.refusals(checked)))
    console.print(render(findings))
    runs = can_run(findings)
    _finish(as_json, can_run=runs, findings=[vars(finding) for finding in findings])
    if recipe and not runs:
        raise typer.Exit(1)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs. Unset: the fewest that the recipe's layout allows.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU model: h100, h200 or a100.")] = "h100",
    mean_response: Annotated[int | None, typer.Option(help="Mean tokens per response, for the step time.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Count what a refit moves, from this layout and others.")] = False,
    search: Annotated[bool, typer.Option("--search", help="Propose layouts that fit, fastest first.")] = False,
    as_json: Json = False,
) -> None:
    """Memory, step time and refit of a recipe on a given number of GPUs; needs no GPU. Exit code 1: it does not fit."""
    spec = load_recipe(recipe, overrides)
    from megafork.plan import hardware, models, planner, table
    from megafork.plan.refit import refits
    from megafork.plan.search import proposals

    shape, source = models.shape_for(spec)
    planned = planner.make_plan(shape, spec, planner.gpus_for(spec, gpus), hardware.gpu_named(gpu), mean_response)
    counted = refits(shape, spec, planned.gpus) if refit else []
    proposed = proposals(planned) if search else None
    console.print(table.render(planned, source, counted, proposed))
    _finish(as_json, **planned.to_dict(), refit=[one.to_dict() for one in counted], search=[one.to_dict() for one in proposed or []])
    if not planned.fits:
        raise typer.Exit(1)


@convert.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Hugging Face folder.", show_default=False)],
    target: Target,
    tp: Annotated[int, typer.Option(help="Tensor parallel ranks that the files are split for; any layout loads them.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages that the files are split for; any layout loads them.")] = 1,
    dtype: Dtype = "keep",
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face folder into a Megatron distributed checkpoint."""
    from megafork.convert import convert

    _convert(lambda tick: convert.hf_to_megatron(source, target, tp=tp, pp=pp, dtype=dtype, verify=verify, progress=tick), as_json)


@convert.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A Megatron checkpoint: converted, or from a run.", show_default=False)],
    target: Target,
    dtype: Dtype = "keep",
    fp8: Annotated[bool, typer.Option("--fp8", help="Projections in e4m3, with one scale per 128 x 128 block.")] = False,
    quantize: Annotated[str | None, typer.Option(help="Name of an nvidia-modelopt config.", show_default=False)] = None,
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Convert a Megatron checkpoint into a Hugging Face folder, or rewrite a Hugging Face folder in another dtype or quantised."""
    from megafork.convert import convert

    _convert(
        lambda tick: convert.megatron_to_hf(source, target, dtype=dtype, fp8=fp8, quantize=quantize, verify=verify, progress=tick), as_json
    )


def _convert(work: Callable[[Tick], Converted], as_json: bool) -> None:
    from megafork.compat import noise

    noise.silence()
    from megafork.convert.convert import progress_bar
    from megafork.convert.verify import VerifyError

    try:
        with progress_bar("converting") as tick:
            done = work(tick)
    except VerifyError as error:
        typer.echo(f"megafork: {error}", err=True)
        raise typer.Exit(1) from None
    compared = "" if done.logit_difference is None else f"   logits differ by at most {done.logit_difference:.2g}"
    console.print(f"{done.target}: {done.tensors} tensors, {done.bytes / 1e9:.3g} GB{compared}")
    _finish(as_json, **{**vars(done), "target": str(done.target)})


def _run(command: Literal["train", "sft"], file: Path, overrides: list[str] | None, as_json: bool) -> None:
    recipe = load_recipe(file, overrides)  # before the imports below, which take a second
    from megafork import commands
    from megafork.ranks import DONE, is_main
    from megafork.report.report import write_report
    from megafork.run_folder import read_metrics

    code = commands.run(command, recipe)
    if code == DONE and is_main():
        folder = recipe.run_folder
        metrics = folder / "metrics.jsonl"
        rows = read_metrics(metrics) if metrics.exists() else []  # the file may have been lost; the run itself has reported it
        page = write_report(folder) if command == "train" and rows else None
        last = rows[-1] if rows else {}
        typer.echo(f"run: {folder}" + (f"   report: {page}" if page else ""))
        _finish(as_json, run=str(folder), report=str(page) if page else None, **last)
    raise typer.Exit(code)


def _finish(as_json: bool, **values: Any) -> None:
    if as_json:
        typer.echo(json.dumps(values))


def main() -> None:
    """Run the command line. Wrong input prints one line to standard error, with exit code 2; a stopping signal one line, with code 1."""
    die_with_starter()
    print_anything()
    try:
        app()
    except RecipeError as error:
        typer.echo(f"megafork: {' '.join(str(error).splitlines())}", err=True)
        raise SystemExit(2) from None
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise SystemExit(1) from None
    except OSError as error:
        if (line := full_disk(error)) is None:
            raise
        typer.echo(f"megafork: {line}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
