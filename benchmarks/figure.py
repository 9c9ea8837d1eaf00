"""The results of a benchmark: figures, each comparing ours with a peer's; and the timing of calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Series:
    """Repeated measurements of one quantity, in order."""

    name: str
    values: list[float]
    cpu: list[float] = field(default_factory=list)
    """For times: also the processor seconds of rank 0, which other programs on the machine affect little."""

    def summary(self) -> dict[str, Any]:
        middle, least, most = statistics.median(self.values), min(self.values), max(self.values)
        cpu = {"cpu_median": statistics.median(self.cpu)} if self.cpu else {}
        return {"name": self.name, "median": middle, "min": least, "max": most, **cpu, "repeats": len(self.values)}


@dataclass(frozen=True)
class Figure:
    """`what` was measured in `unit` (s, MB); less is better. If not run, `ours` and `peer` are None, and the note gives the reason."""

    what: str
    unit: str
    ours: Series | None = None
    peer: Series | None = None
    at_least: float | None = None
    """The target for the ratio of the peer's value to ours."""
    note: str = ""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Further measurements; names include the unit."""

    @property
    def ratio(self) -> float | None:
        """The peer's value divided by ours: the median over neighbouring repeats, which is robust to changes in the machine's load."""
        if self.ours is None or self.peer is None or 0 in self.ours.values:
            return None
        return _ratio(self.peer.values, self.ours.values)

    @property
    def cpu_ratio(self) -> float | None:
        """`ratio` of the processor seconds, if both have them."""
        if self.ours is None or self.peer is None or not self.ours.cpu or not self.peer.cpu:
            return None
        return _ratio(self.peer.cpu, self.ours.cpu)

    def summary(self) -> dict[str, Any]:
        rest = {name: value for name, value in asdict(self).items() if name not in ("ours", "peer")}
        series = {"ours": self.ours and self.ours.summary(), "peer": self.peer and self.peer.summary()}
        return {**rest, **series, "ratio": self.ratio, "cpu_ratio": self.cpu_ratio}


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Series]:
    """Seconds of each call on the slowest rank, `repeats` times in turn (a, b, c, a, b, c ...) after an uncounted warm-up call of each.

    Every rank of the default process group must call it with the same names.
    """
    series = {name: Series(name, []) for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            call()
            cpu = time.process_time() - cpu_start
            dist.barrier()
            taken = [0.0] * dist.get_world_size()  # a rank that leaves the first barrier late starts its clock late
            dist.all_gather_object(taken, time.perf_counter() - start)
            if repeat:
                series[name].values.append(max(taken))
                series[name].cpu.append(cpu)
    return series
