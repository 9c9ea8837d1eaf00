"""The threshold of the top fifth over 4 ranks, and the resulting mask: ours, TRL's own code, and a plain gather + sort."""

from __future__ import annotations

import math
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
from measure import Sent, peak_bytes
from ranks import on_ranks
from torch import Tensor

from benchmarks import peers
from benchmarks.figure import Figure, Series, interleaved
from megafork.parallel.quantile import top_threshold

RANKS = 4
RHO = 0.2
TrlMask = Callable[[Tensor, float], Tensor]
OURS, TRL, SORT = "megafork", "TRL", "gather + sort"


def run(quick: bool) -> list[Figure]:
    few, many = (16_000, 160_000) if quick else (16_000_000, 160_000_000)
    trl_mask = peers.trl_mask()
    times, sent, peaks = on_ranks(RANKS, _compare, few // RANKS, 3 if quick else 5, trl_mask, timeout_s=3600)[0]
    where = f"threshold of {few:,} values, {RANKS} ranks"
    figures = [
        Figure(where, "s", times[OURS], times[SORT], at_least=10.0),
        Figure(where, "s", times[OURS], times[TRL], at_least=10.0),
        Figure(f"{where}: passed to collectives, per rank", "MB", sent[OURS], sent[SORT], note="target: under 1 MB"),
        Figure(f"{where}: peak extra, per rank", "MB", peaks[OURS], peaks[TRL]),
    ]
    where = f"threshold of {many:,} values, {RANKS} ranks, ours in ten chunks"
    trl_needs = peaks[TRL].values[0] * 1e6 * (many / few) * RANKS
    fits = trl_needs < 0.7 * psutil.virtual_memory().available
    times, peaks = on_ranks(RANKS, _large, many // RANKS, trl_mask if fits else None, timeout_s=3600)[0]
    note = "exact" if fits else f"exact; TRL not run: {trl_needs / 1e9:.0f} GB over the ranks is more than this machine has free"
    return [
        *figures,
        Figure(where, "s", times[OURS], times.get(TRL), note=note),
        Figure(f"{where}: peak extra, per rank", "MB", peaks[OURS]),
    ]


def _compare(count: int, repeats: int, trl_mask: TrlMask) -> tuple[dict[str, Series], dict[str, Series], dict[str, Series]]:
    """Times; MB passed to collectives; peak MB."""
    values = _entropies(count)
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: values >= top_threshold(values, RHO, group=dist.group.WORLD).tau,
        SORT: lambda: values >= _gather_and_sort(values),
        TRL: lambda: trl_mask(values[None], 1 - RHO)[0],
    }
    masks, sent = {TRL: calls[TRL]()}, {}
    for name in (OURS, SORT):
        with Sent() as collectives:
            masks[name] = calls[name]()
        sent[name] = Series(name, [sum(size for _, size in collectives.calls) / 1e6])
    assert torch.equal(masks[OURS], masks[SORT])
    differing = int((masks[OURS] != masks[TRL]).sum())
    assert differing <= 1, f"TRL interpolates between two values, which may change one token at most, not {differing}"
    return interleaved(calls, repeats), sent, {name: Series(name, [peak_bytes(calls[name]) / 1e6]) for name in (OURS, TRL)}


def _large(count: int, trl_mask: TrlMask | None) -> tuple[dict[str, Series], dict[str, Series]]:
    """Times and peak MB."""
    chunks = list(_entropies(count).chunk(10))

    def ours() -> float:
        return top_threshold(chunks, RHO, group=dist.group.WORLD).tau

    calls: dict[str, Callable[[], object]] = {OURS: ours}
    if trl_mask is not None:
        whole = torch.cat(chunks)[None]
        calls[TRL] = lambda: trl_mask(whole, 1 - RHO)
    _check_exact(chunks, ours())
    return interleaved(calls, 3), {OURS: Series(OURS, [peak_bytes(ours) / 1e6])}


def _entropies(count: int) -> Tensor:
    """Values distributed like entropies: most near 0, some above 1."""
    g = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(count, generator=g).mul_(2.0).sub_(3.0).exp_()


def _gather_and_sort(values: Tensor) -> float:
    everything = values.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(everything, values)
    return float(everything.sort(descending=True).values[math.ceil(RHO * len(everything)) - 1])


def _check_exact(chunks: list[Tensor], tau: float) -> None:
    """Check that tau is the k-th largest: at least k values are not below it, and fewer than k are above it."""
    counts = torch.tensor([sum(int(f(chunk).sum()) for chunk in chunks) for f in (lambda x: x >= tau, lambda x: x > tau, torch.isfinite)])
    dist.all_reduce(counts)
    at_least, above, total = counts.tolist()
    assert above < math.ceil(RHO * total) <= at_least, "not the k-th largest"
