"""Seconds of a step's phases, tokens per second, and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world

RANGES = "megafork/"
"""Prefix of the names of our ranges in a profile."""


def marked(phase: str) -> record_function:
    """A context that shows up as a range of this name in a profile (`train.profile`), and costs almost nothing without a profiler."""
    return record_function(f"{RANGES}{phase}")


class Clock:
    """Seconds of a step's phases."""

    def __init__(self, begins: Callable[[str], None] = lambda phase: None) -> None:
        """`begins`: called with the name of each phase as it begins."""
        self.started = time.perf_counter()
        self.times: dict[str, float] = {}
        self._begins = begins

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._begins(phase)
        before = time.perf_counter()
        with marked(phase):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - before

    def metrics(self, tokens: int, mesh: Mesh) -> dict[str, float | None]:
        """`time/*`, sampled response tokens per second over the whole step, and the highest memory peak of any rank."""
        whole = time.perf_counter() - self.started
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        times: dict[str, float | None] = {f"time/{phase}": seconds for phase, seconds in self.times.items()}
        return times | {
            "time/step": whole,
            "throughput/tokens_per_s": tokens / whole,
            "memory/peak_gb": over_world([peak / 1e9], mesh, "max")[0],
        }
