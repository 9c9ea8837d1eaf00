"""The commands: each checks its inputs, runs the ranks, then produces the results."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from megafork import ranks
from megafork.compat import noise
from megafork.gpus import check_installation
from megafork.lock import sole_writer
from megafork.ranks import DONE, FAILED
from megafork.recipe import Recipe, RecipeError
from megafork.recipe.data import listed
from megafork.room import check_room, places
from megafork.secret import FIX, NAME, is_loopback, secret
from megafork.shape import check_engines, check_layout, check_world, read_shape

if TYPE_CHECKING:
    from megafork.ablate.options import AblationOptions, Trial
    from megafork.ablate.results import Results as AblationResults
    from megafork.ablate.run import Ablation
    from megafork.analyze.inputs import AnalysisInputs
    from megafork.analyze.options import AnalysisOptions
    from megafork.analyze.statistics import Results as AnalysisResults
    from megafork.convert.named import NamedModel
    from megafork.evaluate.options import EvaluationOptions
    from megafork.evaluate.results import Results
    from megafork.rollout.sample import SampleJob
    from megafork.train.inputs import Inputs

Command = Literal["train", "sft"]
COMMANDS: tuple[Command, ...] = ("train", "sft")


def run(command: Command, recipe: Recipe) -> int:
    """Run a recipe and return the exit code: 0 done, 1 failed, 2 wrong input (before ranks start: raised as RecipeError).

    Starts the ranks and waits for them, unless torchrun or Slurm has started this process as one of them. Inputs are checked before any
    rank starts. If the run already has all its steps, this is reported and nothing is done.
    """
    noise.silence()
    check_installation(engines=_has_engines(command, recipe))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps collectives with matmuls in the order it launched them
    recipe = _with_local_model(recipe)
    joined = ranks.joined()
    world = int(os.environ["WORLD_SIZE"]) if joined else _ranks_here(recipe)
    if not joined:
        check_room(world)
    inputs, _ = preflight(command, recipe, world)
    from megafork.model.kernels import choose
    from megafork.train.inputs import check_resume
    from megafork.train.metrics import gap

    with _sole_writer(recipe.run_folder, f"run.folder is {recipe.run.folder!r} and run.name {recipe.run.name!r}"):
        done = check_resume(recipe, inputs)
        if done >= recipe.train.steps and not _lacks(command, recipe, done):
            ranks.say(f"run {recipe.run.name!r} has all its {recipe.train.steps} steps: raise train.steps, or choose another run.name")
            if ranks.is_main() and (lost := gap(recipe.run_folder / "metrics.jsonl", done)):
                ranks.say(lost)
            return DONE
        if ranks.is_main():
            sys.stdout.write(f"layers: {choose(recipe.model.kernels, recipe.precision, recipe.parallel)}\n")
            sys.stdout.flush()  # before the ranks write
        _say(inputs.remarks)
        job = partial(_train, command, recipe, inputs if joined else None)
        return ranks.do(job, world, recipe.run_folder, reaches_out=bool(_remote_servers(recipe)))


def ablate(options: AblationOptions) -> tuple[int, AblationResults]:
    """Run the remaining trials of an ablation, first those of its grid.

    Returns the exit code and the results of the finished ones.

    If a trial fails, it is reported and the others continue. Raises RecipeError before any rank starts, and in a job of several ranks.
    """
    ablation = _checked(options)
    if options.parallel > 1:
        ablation.places = places(options.parallel, max(_ranks_here(trial.recipe) for trial in options.trials()))
    with _sole_writer(Path(options.out), f"--out is {options.out!r}"):
        results = ablation.run()
    return FAILED if ablation.failed else DONE, results


def left_to_train(options: AblationOptions) -> list[Trial]:
    """The trials of an ablation that can be trained now, each in a job of its own. Raises RecipeError."""
    return _checked(options).left()


def _checked(options: AblationOptions) -> Ablation:
    noise.silence()
    if ranks.joined():
        raise RecipeError("megafork ablate starts ranks itself: call it outside torchrun and srun, or call `megafork train` in them")
    check_installation(engines=True)
    from megafork.ablate.run import Ablation

    def check(recipe: Recipe) -> Inputs:
        return preflight("train", _with_local_model(recipe), _ranks_here(recipe))[0]

    ablation = Ablation(options, check, _attempt, ranks.say)
    ablation.check()
    return ablation


def evaluate(options: EvaluationOptions) -> tuple[int, Results | None]:
    """Run or resume an evaluation. Returns the exit code and, unless sampling failed or this is not `is_main`, the results.

    Raises RecipeError. The code is 1 if the verifier failed on every response. If no completions are missing, no rank is started.
    """
    noise.silence()
    check_installation(engines=True)
    from megafork.evaluate.inputs import read_inputs
    from megafork.evaluate.results import failure, judge_responses

    inputs = read_inputs(options)
    _say(inputs.remarks)
    job = inputs.job()
    with contextlib.ExitStack() as held:
        for sampling in job.samplings:
            held.enter_context(_sole_writer(job.store(sampling).folder, f"--out is {options.out!r}"))
        if any(job.missing()):
            job.describe()
            code = ranks.do(partial(_sample, job, inputs.model), options.ranks or _gpus(options.tp), inputs.folder)
            if code != DONE:
                return code, None
        if not ranks.is_main():
            return DONE, None
        results = judge_responses(inputs)
        if failed := failure(results):
            ranks.say(failed)
        return FAILED if failed else DONE, results


def analyze(options: AnalysisOptions) -> tuple[int, AnalysisResults | None]:
    """Run or resume an analysis. Returns the exit code and, unless it failed or this is not `is_main`, the results.

    Raises RecipeError. Responses that are already sampled or scored are reused.
    """
    noise.silence()
    check_installation(engines=True)
    from megafork.analyze.inputs import read_inputs
    from megafork.analyze.score import unscored

    inputs = read_inputs(options)
    _say(inputs.remarks)
    world = options.ranks or _gpus(options.model_size)
    with _sole_writer(inputs.folder, f"--out is {options.out!r}"):
        if any(inputs.job.missing()):
            inputs.job.describe()
            code = ranks.do(partial(_sample, inputs.job, inputs.author), world, inputs.folder)
            if code != DONE:
                return code, None
        if unscored(inputs):
            code = ranks.do(partial(_score, inputs), world, inputs.folder)
            if code != DONE:
                return code, None
        if not ranks.is_main():
            return DONE, None
        from megafork.analyze.page import write_page
        from megafork.analyze.statistics import analyse

        results = analyse(inputs)
        write_page(inputs, results)
        return DONE, results


def is_here(recipe: Recipe) -> bool:
    """Whether the model and data can be read without a network."""
    return Path(recipe.model.path).is_dir() and not any(
        source.startswith("hub:") for source in (*listed(recipe.data.train), *listed(recipe.data.eval))
    )


def refusals(recipe: Recipe) -> dict[str, str]:
    """For each of `megafork train` and `megafork sft` that would refuse the recipe on this machine, the reason."""
    noise.silence()
    refused: dict[str, str] = {}
    for command in COMMANDS:
        try:
            check_installation(engines=_has_engines(command, recipe))
            world = _ranks_here(recipe)
            check_room(world)
            preflight(command, _with_local_model(recipe), world)
        except RecipeError as error:
            refused[command] = str(error)
    return refused


def preflight(command: Command, recipe: Recipe, world: int) -> tuple[Inputs, int]:
    """Check everything about the input that can be known before ranks start, quickest checks first. Raises RecipeError.

    Returns the inputs, and the step of the newest checkpoint in the run folder, or 0 if there is none.
    """
    check_world(recipe.parallel, world)
    if command == "train" and (remote := _remote_servers(recipe)) and secret() is None:
        raise RecipeError(f"rollout.servers has {remote[0]!r}, on another machine, and {NAME} is not set: {FIX}")
    if _has_engines(command, recipe):
        check_engines(recipe.rollout.tp, world)
    shape = read_shape(Path(recipe.model.path))
    check_layout(shape, recipe.parallel)
    from megafork.data.reward import Verifiers
    from megafork.model import fp8, kernels, precision
    from megafork.rl.own import check_functions
    from megafork.train import boards
    from megafork.train.inputs import check_resume, read_inputs
    from megafork.train.profile import check_profile
    from megafork.train.sft import examples

    if command == "train":
        fp8.check_rollouts(shape, recipe)
    precision.check_training(shape, recipe.precision, recipe.parallel, recipe.model.kernels)
    precision.check_machine(recipe.precision)
    kernels.choose(recipe.model.kernels, recipe.precision, recipe.parallel)
    boards.check_boards(recipe.log)
    check_profile(recipe.log)
    if command == "train":
        check_functions(recipe)
    if command == "train" and ":" in recipe.reward.verifier:  # the user's own file may not load
        with Verifiers(recipe.reward.model_copy(update={"workers": 1})):
            pass
    inputs = read_inputs(recipe, supervised=command == "sft")
    if command == "sft":
        examples(inputs.train, inputs.tokenizer, recipe, positions=inputs.shape.max_positions)
    return inputs, check_resume(recipe, inputs)


def _say(remarks: list[str]) -> None:
    """Print remarks once, no matter who started the ranks."""
    for remark in remarks if ranks.is_main() else ():
        ranks.say(remark)


def _with_local_model(recipe: Recipe) -> Recipe:
    from megafork.data.hub import local_model

    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": local_model(recipe.model.path)})})


def _attempt(recipe: Recipe) -> str | None:
    """Train, and write the report. Returns the reason for a failure, which is also printed at once, or None."""
    try:
        code = run("train", recipe)
    except RecipeError as error:
        ranks.say(f"megafork: {error}")
        return str(error)
    if code != DONE:
        return f"see above, and {recipe.run_folder / 'logs'}"
    from megafork.report.report import write_report

    write_report(recipe.run_folder)
    return None


def _remote_servers(recipe: Recipe) -> list[str]:
    return [url for url in recipe.rollout.servers if not is_loopback(urlsplit(url).hostname or "")]


def _lacks(command: Command, recipe: Recipe, step: int) -> bool:
    """Whether a run with its last checkpoint at `step` still lacks its export or its last evaluation, because it was killed."""
    from megafork.run_folder import is_evaluated, is_exported

    return not is_exported(recipe, step) or (command == "train" and not is_evaluated(recipe, step))


@contextlib.contextmanager
def _sole_writer(folder: Path, field: str) -> Iterator[None]:
    """`lock.sole_writer`, held by the main process only.

    A requeued batch job waits: the server of a network file system takes minutes to notice that a node is lost.
    """
    if not ranks.is_main():
        yield
        return
    with sole_writer(folder, field, patience_s=180.0 if os.environ.get("MEGAFORK_JOB") else 0.0):
        yield


def _has_engines(command: Command, recipe: Recipe) -> bool:
    """Whether ranks host vLLM engines."""
    return command == "train" and not recipe.rollout.servers


def _ranks_here(recipe: Recipe) -> int:
    if recipe.run.ranks is not None:
        return recipe.run.ranks
    import torch

    return torch.cuda.device_count() or recipe.parallel.smallest_world


def _gpus(multiple: int) -> int:
    """The number of GPUs, rounded down to a multiple of `multiple`; with fewer GPUs, `multiple`."""
    import torch

    return torch.cuda.device_count() // multiple * multiple or multiple


def _train(command: Command, recipe: Recipe, inputs: Inputs | None) -> int:
    from megafork.parallel.mesh import build_mesh, join_world
    from megafork.train.inputs import read_inputs
    from megafork.train.loop import train
    from megafork.train.sft import sft
    from megafork.train.stopped import Stopped

    device = join_world()
    mesh = build_mesh(recipe.parallel, seed=recipe.run.seed, device=device)
    inputs = inputs or read_inputs(recipe, supervised=command == "sft")
    try:
        {"train": train, "sft": sft}[command](recipe, mesh, inputs)
    except Stopped as reason:
        ranks.record(str(reason))
        return FAILED
    return DONE


def _sample(job: SampleJob, model: NamedModel) -> int:
    from megafork.parallel.mesh import join_world
    from megafork.rollout.sample import sample

    sample(job, model.tensors(), join_world())
    return DONE


def _score(inputs: AnalysisInputs) -> int:
    from megafork.analyze.score import score_responses
    from megafork.parallel.mesh import join_world

    score_responses(inputs, join_world())
    return DONE
