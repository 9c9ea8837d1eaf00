"""Measures the actual cost of a call: the collectives that it sends, and its peak memory; counts the buffer of a refit from its plan."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megafork.weights.mapping import shards_of
from megafork.weights.reshard import Reshard


class Sent(TorchDispatchMode):
    """Within it, `calls` grows by one (name, bytes) for each collective of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls.append((func._opname, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak of what the CPU allocator handed out during `call()`, above what was held before it.

    Python collects cycles the more rarely the more objects there are; those of earlier tests are not counted.
    """
    gc.collect()
    gc.freeze()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    gc.unfreeze()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def largest_bucket(plan: Reshard) -> int:
    """Most bytes in bf16 that a rank holds for one bucket of a refit: its whole tensors, and what it sends and receives in one round.
    Parameters of one rule that the same ranks hold are counted once: their transfers are alike."""
    largest = 0
    for bucket, _ in plan.alike:
        moved = Counter[tuple[bool, int]]()
        kinds = Counter((p.rule, shards_of(p, plan.shape, plan.layout), plan.owner(p)) for p in bucket)
        for parameter in bucket:
            times = kinds.pop((parameter.rule, shards_of(parameter, plan.shape, plan.layout), plan.owner(parameter)), 0)
            for transfer in plan.transfers([parameter] if times else []):
                for rank in {transfer.source, transfer.target} if transfer.source != transfer.target else ():
                    moved[transfer.relayed, rank] += times * transfer.numel
        whole = sum(math.prod(plan.full_shape(name)) for parameter in bucket for name in parameter.huggingface())
        largest = max(largest, whole + max(moved.values(), default=0))
    return 2 * largest
