"""The Triton kernels on a GPU: the bytes per second that they must move, as a share of a copy's bandwidth in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.figure import Figure, Series

SHARE = 0.8


def run(quick: bool) -> list[Figure]:
    if not torch.cuda.is_available():
        return [Figure("kernels: share of the copy's bandwidth", "s", note="not run: no GPU")]
    from megafork.parallel import kernels  # imports triton
    from megafork.parallel.blocks import LOWEST, GradientTerms

    n, columns, repeats = (256, 4096, 3) if quick else (4096, 37_984, 20)  # Qwen3's vocabulary at TP 4
    logits = torch.randn(n, columns, device="cuda")
    ones, targets = torch.ones(n, device="cuda"), torch.randint(columns, (n,), device="cuda")
    stats = torch.zeros(4, n, device="cuda")
    stats[0] = LOWEST
    kernels.accumulate_stats(stats, logits, targets, ones)
    terms = GradientTerms(ones, stats[0].clone(), stats[1].log(), ones, ones, ones)
    target, copy = torch.empty_like(logits, dtype=torch.bfloat16), torch.empty_like(logits)
    calls: dict[str, tuple[int, Callable[[], object]]] = {  # bytes per logit
        "copy": (8, lambda: copy.copy_(logits)),
        "forward": (4, lambda: kernels.accumulate_stats(stats, logits, targets, ones)),
        "backward to bf16": (6, lambda: kernels.logits_gradient(logits, targets, terms, target.dtype)),
        "backward in place": (8, lambda: kernels.logits_gradient(copy, targets, terms, copy.dtype)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, (_, call) in calls.items():
            taken = _seconds(call)
            if repeat:
                seconds[name].append(taken)
    figures = []
    for name, (size, _) in list(calls.items())[1:]:
        fair = [value * size / 8 for value in seconds["copy"]]  # the copy's time for the same number of bytes
        ours, peer = Series(name, seconds[name]), Series("a copy of as many bytes", fair)
        figures.append(Figure(f"kernel: n {n:,}, columns {columns:,}, fp32 logits", "s", ours, peer, at_least=SHARE))
    return figures


def _seconds(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
