"""Check a node before the ranks start: srun runs it once on each node of a job. Each problem is one line, and the exit code is then 1.

python slurm/preflight.py RANKS train|sft RECIPE [section.key=value ...]

The first node also checks what all nodes share, and writes the resolved recipe into the job's folder: the ranks read exactly what was
checked, even if the recipe file changes while the job runs. With GPUs it plans the step, checks it against the job's deadlines, and writes
next to the recipe how many seconds before its end the job is to be asked to stop.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.text import Text

from megafork import commands
from megafork.commands import Command
from megafork.compat import noise
from megafork.data.hub import local_model
from megafork.doctor import examine
from megafork.plan.hardware import Gpu, gpu_here
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.shape import read_shape

FREE_GPU = 0.9
"""Share of a GPU's memory that must be free: less means that another process is using it."""


def main(ranks: int, command: Command, file: str, overrides: list[str]) -> int:
    noise.silence()
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    try:
        recipe = load_recipe(file, overrides)
    except RecipeError as error:
        return _say([str(error)] if first else [])  # every node would report the same
    try:
        local = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": local_model(recipe.model.path)})})
        problems = list(_node(recipe, ranks)) or list(_shared(local, command, ranks) if first else ())
    except RecipeError as error:
        problems = [str(error)]
    if problems:
        return _say(problems)
    if first:
        _job_folder().joinpath("recipe.yaml").write_text(recipe.to_yaml())
    return 0


def _say(problems: list[str]) -> int:
    for problem in problems:
        sys.stderr.write(f"{socket.gethostname()}: {' '.join(problem.split())}\n")
    return 1


def _node(recipe: Recipe, ranks: int) -> Iterator[str]:
    """Problems of this node alone."""
    if not _job_folder().is_dir():
        yield f"{_job_folder()} does not exist: put MEGAFORK_LOGS on a file system that all nodes share"
    for finding in examine(recipe):
        if finding.needed and not finding.ok:
            yield f"{finding.name}: {finding.found or 'nothing'}: {finding.cost}"
    if os.environ.get("MEGAFORK_CPU") != "1":
        yield from _gpus(-(-ranks // int(os.environ["SLURM_STEP_NUM_NODES"])))


def _gpus(wanted: int) -> Iterator[str]:
    """One GPU per rank, each free and working."""
    there = torch.cuda.device_count()
    if there < wanted:
        yield f"{there} GPUs for {wanted} ranks: check nvidia-smi, or set MEGAFORK_CPU=1 to try out without GPUs"
    for index in range(there):
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(1, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            yield f"GPU {index} does not work: {' '.join(str(error).split())[:200]}"
            continue
        if free < FREE_GPU * total:
            yield f"GPU {index} has {free / 1e9:.0f} of {total / 1e9:.0f} GB free: another process is using it"


def _shared(recipe: Recipe, command: Command, ranks: int) -> Iterator[str]:
    """Problems that all nodes share: layout, model, data, the run's checkpoint, and disk space for the next ones. Raises RecipeError."""
    commands.preflight(command, recipe, ranks)
    if torch.cuda.is_available() and os.environ.get("MEGAFORK_CPU") != "1":
        gpu = gpu_here(torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1])
        yield from planned(recipe, command, ranks, gpu)
    needed = _bytes_to_write(recipe)
    folder = next(path for path in (recipe.run_folder.absolute(), *recipe.run_folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield (
            f"{folder} has {free / 1e9:.0f} GB free, but checkpoints and the exported model of run {recipe.run.name!r} need "
            f"{needed / 1e9:.0f} GB more: free some space, or choose another run.folder or a smaller checkpoint.keep_last"
        )


def planned(recipe: Recipe, command: Command, ranks: int, gpu: Gpu) -> Iterator[str]:
    """Whether `megafork plan` finds the run too large for the GPUs, with the keys that would fix it, or too slow for the job's deadlines.
    Writes down how early the job is to be asked to stop. Supervised runs are not planned."""
    if command == "sft":
        return
    from megafork.plan.planner import make_plan  # imports Megatron, as `complete` below
    from megafork.plan.table import verdict

    plan = make_plan(read_shape(Path(recipe.model.path)), recipe, ranks, gpu)
    if not plan.fits:
        lines = [Text.from_markup(line).plain for line in verdict(plan)]
        yield f"{'; '.join(lines)}; `megafork plan` shows the details"
    left = os.environ.get("MEGAFORK_TIME_LEFT_S")
    yield from plan.deadlines.missed(float(os.environ["MEGAFORK_HANG_S"]), float(left) if left else None)
    _job_folder().joinpath("warning_s").write_text(f"{plan.deadlines.warning}\n")


def _bytes_to_write(recipe: Recipe) -> int:
    """Bytes for weights, fp32 main weights and Adam's two moments of each checkpoint still to be written; the newest is written before the
    oldest is deleted."""
    from megafork.weights.checkpoint import complete  # imports Megatron, which only the first node needs
    from megafork.weights.mapping import huggingface_shapes

    parameters = sum(math.prod(shape) for shape in huggingface_shapes(read_shape(Path(recipe.model.path))).values())
    weight = {"fp32": 4, "bf16": 2}[recipe.precision.dtype]
    there = len(complete(recipe.run_folder / "checkpoints"))
    checkpoints = recipe.checkpoint.keep_last + 1 - min(there, recipe.checkpoint.keep_last)
    return parameters * (checkpoints * (weight + 12) + (weight if recipe.checkpoint.export_hf else 0))


def _job_folder() -> Path:
    return Path(os.environ["MEGAFORK_JOB"])


if __name__ == "__main__":
    _, _ranks, _command, _file, *_overrides = sys.argv
    raise SystemExit(main(int(_ranks), "sft" if _command == "sft" else "train", _file, _overrides))
