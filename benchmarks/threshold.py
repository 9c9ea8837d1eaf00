"""The threshold of the top fifth over 4 ranks, and the mask it gives: ours, TRL's own code, and a plain gather + sort."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from measure import Sent
from ranks import on_ranks
from torch import Tensor

from benchmarks import peers
from benchmarks.figure import Figure, Series, interleaved
from megafork.parallel.quantile import top_threshold

RANKS = 4
RHO = 0.2
OURS, TRL, SORT = "megafork", "TRL", "gather + sort"


def run(quick: bool) -> list[Figure]:
    few, many = (16_000, 160_000) if quick else (16_000_000, 160_000_000)
    series, bytes_sent = on_ranks(RANKS, _compare, few // RANKS, 3 if quick else 5, peers.trl_mask(), timeout_s=3600)[0]
    megabytes = {name: Series(name, [sent / 1e6]) for name, sent in bytes_sent.items()}
    where = f"threshold of {few:,} values, {RANKS} ranks"
    alone, refusal = on_ranks(RANKS, _large, many // RANKS, peers.trl_mask(), timeout_s=3600)[0]
    return [
        Figure(where, "s", series[OURS], series[SORT], at_least=10.0),
        Figure(where, "s", series[OURS], series[TRL], at_least=10.0),
        Figure(f"{where}: handed to collectives, a rank", "MB", megabytes[OURS], megabytes[SORT], note="to be under 1 MB"),
        Figure(f"threshold of {many:,} values, {RANKS} ranks", "s", alone, note=f"exact; TRL: {refusal}"),
    ]


def _compare(count: int, repeats: int, trl_mask: Callable[[Tensor, float], Tensor]) -> tuple[dict[str, Series], dict[str, int]]:
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
        sent[name] = sum(size for _, size in collectives.calls)
    assert torch.equal(masks[OURS], masks[SORT])
    differing = int((masks[OURS] != masks[TRL]).sum())
    assert differing <= 1, f"TRL interpolates between two values, which may move one of them: {differing}"
    return interleaved(calls, repeats), sent


def _large(count: int, trl_mask: Callable[[Tensor, float], Tensor]) -> tuple[Series, str]:
    """The time of ours in ten chunks, and what TRL says."""
    chunks = list(_entropies(count).chunk(10))
    series = interleaved({OURS: lambda: top_threshold(chunks, RHO, group=dist.group.WORLD)}, 3)[OURS]
    _check_exact(chunks, top_threshold(chunks, RHO, group=dist.group.WORLD).tau)
    try:
        trl_mask(torch.cat(chunks)[None], 1 - RHO)
    except RuntimeError as error:
        return series, str(error).splitlines()[0]
    return series, "works"


def _entropies(count: int) -> Tensor:
    """Skewed as entropies are: most near 0, some above 1."""
    g = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(count, generator=g).mul_(2.0).sub_(3.0).exp_()


def _gather_and_sort(values: Tensor) -> float:
    everything = values.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(everything, values)
    return float(everything.sort(descending=True).values[math.ceil(RHO * len(everything)) - 1])


def _check_exact(chunks: list[Tensor], tau: float) -> None:
    """The k-th largest: at least k values are not below it, fewer than k above it."""
    counts = torch.tensor([sum(int(f(chunk).sum()) for chunk in chunks) for f in (lambda x: x >= tau, lambda x: x > tau, torch.isfinite)])
    dist.all_reduce(counts)
    at_least, above, total = counts.tolist()
    assert above < math.ceil(RHO * total) <= at_least, "not the k-th largest"
