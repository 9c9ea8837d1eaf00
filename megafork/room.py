"""Whether ranks fit on this machine, alone or in several runs side by side."""

from __future__ import annotations

import os

from megafork.gpus import gpu_count
from megafork.recipe.kinds import RecipeError

GB_A_CPU_RANK = 0.8
"""Memory in GB that Python, torch, megatron-core and vLLM take in a rank before any model is loaded, measured without a GPU."""


def check_room(world: int) -> None:
    """Refuse more ranks than this machine has GPUs or, without GPUs, memory for. Raises RecipeError."""
    import torch

    which, elsewhere = (
        f"run.ranks (or parallel.tp x pp x cp) is {world}",
        "start fewer, or start them on more machines with Slurm or torchrun",
    )
    gpus = torch.cuda.device_count()
    if gpus and world > gpus:
        raise RecipeError(f"{which}, but this machine has {gpus} GPUs: {elsewhere}")
    if not gpus and (lacking := _lacking_memory(world)):
        raise RecipeError(f"{which}: {lacking}: {elsewhere}")


def places(at_once: int, world: int) -> list[dict[str, str]]:
    """For each of `at_once` runs of `world` ranks, the environment variables that give it GPUs of its own; none without GPUs.

    Raises RecipeError if they need more GPUs or, without GPUs, more cores or memory than this machine has.
    """
    needed, gpus = at_once * world, gpu_count()
    which = f"--parallel is {at_once}: {at_once} runs at once of {world} rank{'s' * (world > 1)} need"
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        if needed > cores:
            raise RecipeError(f"{which} {needed} cores, but this machine has {cores}: give a smaller number, or set run.ranks")
        if lacking := _lacking_memory(needed):
            raise RecipeError(f"--parallel is {at_once}: {lacking}: give a smaller number")
        return [{} for _ in range(at_once)]
    if needed > gpus:
        raise RecipeError(f"{which} {needed} GPUs, but this machine has {gpus}: give a smaller number, or set run.ranks")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    names = visible.split(",")[:gpus]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[start : start + world])} for start in range(0, needed, world)]


def _lacking_memory(world: int) -> str | None:
    import psutil

    needed, memory = world * GB_A_CPU_RANK, psutil.virtual_memory().total / 1e9
    return f"these ranks need {needed:.0f} GB to start, but this machine has {memory:.0f} GB" if needed > memory else None
