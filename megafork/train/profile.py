"""Profiles chosen steps (`log.profile`): where their time or their memory goes. It changes no numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity

from megafork.files import whole
from megafork.parallel.mesh import Mesh
from megafork.recipe import Key, Log, Recipe, RecipeError
from megafork.run_folder import operators_file

MOST_OPERATORS = 30
"""Operators kept for the report."""
MOST_ALLOCATIONS = 1_000_000
"""A memory snapshot keeps this many of the latest allocations and frees."""


def check_profile(log: Log) -> None:
    """Raises RecipeError for a profile that needs CUDA on a machine without it."""
    if log.profile is not None and log.profile.what != "torch" and not torch.cuda.is_available():
        raise RecipeError(
            Key("log.profile.what"),
            f" is {log.profile.what!r}, which looks at CUDA, and torch finds no GPU here: choose torch, or leave log.profile out",
        )


@contextmanager
def profiled(recipe: Recipe, step: int, mesh: Mesh) -> Iterator[None]:
    """Wraps one step, and profiles it if the recipe asks for it. Every rank enters, and no rank waits for another.

    `torch` and `memory`: rank 0 writes into the run folder's profile/. `nsys`: profiles every rank that runs under `nsys profile`.
    """
    spec = recipe.log.profile
    if spec is None or step not in spec.steps or not (mesh.is_rank_zero or spec.what == "nsys"):
        yield
        return
    table = operators_file(recipe.run_folder, step)
    table.parent.mkdir(parents=True, exist_ok=True)
    looks: dict[str, AbstractContextManager[None]] = {"torch": _trace(table), "memory": _memory(table), "nsys": _ranges()}
    with looks[spec.what]:
        yield


@contextmanager
def _trace(table: Path) -> Iterator[None]:
    """Every operator, within our phases: step_N.trace.json.gz for Perfetto or chrome://tracing, and the table for the report."""
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        yield
    seen.export_chrome_trace(str(table.with_suffix(".trace.json.gz")))
    with whole(table) as unfinished:
        unfinished.write_text(json.dumps(operators(seen.key_averages(), cuda=cuda)))


def operators(averages: Iterable[FunctionEventAvg], *, cuda: bool) -> list[dict[str, Any]]:
    """The most expensive operators of a torch profile, most expensive first: name, calls, seconds excluding the operators they call, and
    share of the total seconds. With `cuda` these are kernels: a replayed graph has no other operators."""
    device, field = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    mine = [one for one in averages if one.device_type == device and not one.is_user_annotation]
    found = [(getattr(one, field) / 1e6, one.count, str(one.key)) for one in mine]
    total = sum(seconds for seconds, _, _ in found)
    kept = [one for one in sorted(found, reverse=True)[:MOST_OPERATORS] if one[0] > 0]
    return [{"name": name, "calls": calls, "seconds": seconds, "share": seconds / total} for seconds, calls, name in kept]


@contextmanager
def _memory(table: Path) -> Iterator[None]:
    """What torch allocated and freed, and from where in the code: step_N.memory.pickle for https://pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
    try:
        yield
        with whole(table.with_suffix(".memory.pickle")) as unfinished:
            torch.cuda.memory._dump_snapshot(str(unfinished))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _ranges() -> Iterator[None]:
    """The start and stop that `nsys profile --capture-range=cudaProfilerApi` waits for, with phases and operators as NVTX ranges."""
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx():
        yield
