"""Measures the actual cost of a call: the collectives that it sends, and its peak memory in bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


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
