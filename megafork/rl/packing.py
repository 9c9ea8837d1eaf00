"""Distributes responses over DP ranks and packs them into micro-batches.

The plan depends only on the responses' lengths and is computed identically on every rank. Loss, gradients and masks do not depend on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial

import torch

from megafork.parallel.context import places_of, unzigzag_index, zigzag_index
from megafork.parallel.mesh import Mesh
from megafork.parallel.to_device import to_device
from megafork.rl.batch import MicroBatch, Response


def plan(lengths: Sequence[int], dp: int, budget: int, multiple: int = 1, count_multiple: int = 1) -> list[list[list[int]]]:
    """Indices of the sequences in each micro-batch of each DP rank: plan[rank][micro] -> indices.

    Sequences are padded to `multiple`; a micro-batch holds at most `budget` padded tokens (one longer sequence alone may exceed it).
    Every rank gets the same number of micro-batches, a multiple of `count_multiple`; some may be empty when there are few sequences.
    Balanced greedily, longest first (LPT), by linear plus quadratic cost.
    """
    padded = _padded(lengths, multiple)
    order = _longest_first(padded)
    ranks = [[order[n] for n in members] for members in _spread([_cost(padded[n]) for n in order], dp)]
    return _fill(ranks, padded, budget, count_multiple)


def plan_in_place(
    lengths: Sequence[int], dp_rank_of: Sequence[int], dp: int, budget: int, multiple: int = 1, count_multiple: int = 1
) -> list[list[list[int]]]:
    """`plan` for sequences that stay on the DP ranks that hold them."""
    padded = _padded(lengths, multiple)
    order = _longest_first(padded)
    return _fill([[n for n in order if dp_rank_of[n] == rank] for rank in range(dp)], padded, budget, count_multiple)


def _padded(lengths: Sequence[int], multiple: int) -> list[int]:
    return [-(-length // multiple) * multiple for length in lengths]


def _longest_first(padded: Sequence[int]) -> list[int]:
    return sorted(range(len(padded)), key=lambda n: (-padded[n], n))


def _fill(ranks: list[list[int]], padded: Sequence[int], budget: int, count_multiple: int) -> list[list[list[int]]]:
    """Micro-batches of each rank's sequences, given longest first; equally many on every rank."""
    count = max((_bins_needed([padded[n] for n in members], budget) for members in ranks), default=0)
    result = []
    for members in ranks:
        micros = _pack(members, padded, budget, count)
        while micros is None:  # balanced packing may need more bins than first fit
            count += 1
            micros = _pack(members, padded, budget, count)
        result.append(micros)
    count = -(-count // count_multiple) * count_multiple
    return [micros + [[] for _ in range(count - len(micros))] for micros in result]


def _cost(length: int) -> float:
    """Time of a sequence up to a factor: linear layers, plus attention at 2^-15 per token squared (roughly right for Qwen3's sizes)."""
    return length + length * length / 32768


def _spread(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Assign items, given most expensive first, each to the bin with the lowest cost so far."""
    heap = [(0.0, n) for n in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for item, cost in enumerate(costs):
        load, n = heapq.heappop(heap)
        members[n].append(item)
        heapq.heappush(heap, (load + cost, n))
    return members


def _bins_needed(lengths: Sequence[int], budget: int) -> int:
    """Number of micro-batches that first fit needs for these sequences, given longest first."""
    bins: list[int] = []
    for length in lengths:
        for n, load in enumerate(bins):
            if load + length <= budget:
                bins[n] += length
                break
        else:
            bins.append(length)
    return len(bins)


def _pack(items: Sequence[int], padded: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Put items, given longest first, into `count` micro-batches, each into the emptiest one; None if that exceeds the budget."""
    heap = [(0, n) for n in range(count)]
    micros: list[list[int]] = [[] for _ in range(count)]
    for item in items:
        load, n = heapq.heappop(heap)
        if load and load + padded[item] > budget:
            return None
        micros[n].append(item)
        heapq.heappush(heap, (load + padded[item], n))
    return micros


def pack(
    responses: list[Response],
    *,
    cp: int = 1,
    cp_rank: int = 0,
    multiple: int = 1,
    whole: int = 1,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pack responses into the micro-batch that CP rank `cp_rank` sees.

    Each sequence is padded to a multiple of `multiple` (itself a multiple of 2 cp), and the total to a multiple of `whole` (a multiple of
    `multiple`, or 1) by a final sequence of padding. `temperature`: the one at which the tokens were drawn.

    An empty list gives one sequence of padding with no positions: a rank without data still takes part in every collective.
    """
    lengths = tuple(-(-response.length // multiple) * multiple for response in responses) or (multiple,)
    if missing := -sum(lengths) % whole:
        lengths = (*lengths, missing)
    total = sum(lengths)
    tokens = torch.zeros(total, dtype=torch.int64)
    owner = torch.full((total,), -1)
    where, targets, sequence, offset, rollout, entropies, advantage = [], [], [], [], [], [], []
    start = 0
    for n, response in enumerate(responses):
        prompt, answer = len(response.prompt_tokens), len(response.tokens)
        tokens[start : start + prompt] = response.prompt_tokens
        tokens[start + prompt : start + prompt + answer - 1] = response.tokens[:-1]
        owner[start : start + response.length] = n
        where.append(torch.arange(start + prompt - 1, start + prompt - 1 + answer))
        targets.append(response.tokens.long())
        sequence.append(torch.full((answer,), n))
        offset.append(torch.arange(answer))
        rollout.append(response.log_probs)
        entropies.append(response.entropies)
        advantage.append(torch.full((answer,), response.advantage))
        start += lengths[n]
    held = zigzag_index(lengths, cp, cp_rank)
    local = torch.full((total,), -1)
    local[held] = torch.arange(len(held))
    positions = local[_cat(where, torch.int64)]
    mine = positions >= 0

    def moved(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return to_device(_cat(parts, dtype)[mine], device)

    routing = None
    if responses and responses[0].routing.dim() == 3:
        routing = torch.full((total, *responses[0].routing.shape[1:]), -1, dtype=torch.int16)
        routing[owner >= 0] = torch.cat([response.routing for response in responses])
        routing = to_device(routing[held], device)
    return MicroBatch(
        responses=responses,
        tokens=to_device(tokens[held].unsqueeze(0), device),
        lengths=lengths,
        places=to_device(places_of(lengths, held), device),
        order=to_device(unzigzag_index(lengths, cp), device) if cp > 1 else None,
        owner=to_device(owner[held], device),
        positions=to_device(positions[mine], device),
        positions_on_host=positions[mine],
        targets=moved(targets, torch.int64),
        sequence=moved(sequence, torch.int64),
        offset=moved(offset, torch.int64),
        rollout_log_prob=moved(rollout, torch.float32),
        rollout_entropy=moved(entropies, torch.float32) if any(len(part) for part in entropies) else torch.empty(0, device=device),
        advantage=moved(advantage, torch.float32),
        temperature=torch.full((int(mine.sum()),), temperature, dtype=torch.float32, device=device),
        entropy_temperature=temperature,
        routing=routing,
    )


def _cat(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.empty(0, dtype=dtype)


def placement(lengths: Sequence[int], budget: int, mesh: Mesh) -> list[list[list[int]]]:
    """Indices of the sequences in each micro-batch of each DP rank: `plan` under the mesh's layout. `budget`: tokens per micro-batch."""
    return plan(lengths, mesh.dp, budget, mesh.layout.sequence_multiple, mesh.layout.micro_batch_multiple)


def packer(mesh: Mesh, *, whole: int, temperature: float) -> Callable[[list[Response]], MicroBatch]:
    """A function that packs responses into this rank's micro-batch. `whole`: the multiple it is padded to (1 except in FP8).
    `temperature`: the roll-out's, or 1 under fork-aware decoding."""
    return partial(
        pack,
        cp=mesh.layout.cp,
        cp_rank=mesh.cp_rank,
        multiple=mesh.layout.sequence_multiple,
        whole=whole,
        temperature=temperature,
        device=mesh.device,
    )
