"""A run plans its refits once, when it starts, and a refit plans nothing (`tests/test_reshard.py`): the time for it on one rank.

Offline, with Qwen3-32B's shape, training at TP 8 PP 4 and engines of TP 8, 8 ranks per node. Ours enumerates what the rank itself sends and
receives in all layers; beside it, every rank's transfers of one layer of each stage, from which a rank would have to pick its own. The last
number is our most processor seconds, which a busy machine changes little.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.figure import Figure, Series
from megafork.plan.models import KNOWN
from megafork.recipe import Parallel
from megafork.weights.reshard import Reshard

LAYOUT, ENGINE = Parallel(tp=8, pp=4, sp=True), 8
OURS, EVERYTHING = "own routes, all layers", "every transfer, one layer per stage"


def run(quick: bool) -> list[Figure]:
    return [_figure(world, repeats=1 if quick else 5) for world in (64, 512, 4096)]


def _figure(world: int, repeats: int) -> Figure:
    series = {OURS: Series(OURS, []), EVERYTHING: Series(EVERYTHING, [])}
    calls: dict[str, Callable[[Reshard], object]] = {OURS: lambda plan: plan.routes(world // 2 + 3), EVERYTHING: _enumerate}
    for _ in range(repeats):
        for name, call in calls.items():
            plan = Reshard(KNOWN["qwen3-32b"], LAYOUT, world, ENGINE)  # a new one has nothing cached
            start, cpu_start = time.perf_counter(), time.process_time()
            call(plan)
            series[name].cpu.append(time.process_time() - cpu_start)
            series[name].values.append(time.perf_counter() - start)
    most = max(series[OURS].cpu)
    return Figure(
        f"planning on {world:,} ranks", "s", series[OURS], series[EVERYTHING], note="target: under 1 s", extra={"processor_s_most": most}
    )


def _enumerate(plan: Reshard) -> None:
    layers = {plan.stage(bucket[0]): bucket for bucket in plan.buckets if bucket[0].layer is not None}
    for bucket in layers.values():
        for _ in plan.transfers(bucket):
            pass
