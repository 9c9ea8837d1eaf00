"""The zigzag split of sequences over context-parallel ranks: which tokens a rank holds, and the inverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def zigzag_index(lengths: Sequence[int], cp: int, rank: int) -> Tensor:
    """Indices of CP rank `rank`'s tokens, in its local order, into the packed tokens of all sequences in global order: int64 [T / cp].

    Each length must be a multiple of 2 cp (any length when cp is 1): rank r holds chunks r and 2 cp - 1 - r of every sequence.
    """
    if cp == 1:
        return torch.arange(sum(lengths))
    parts, start = [], 0
    for length in lengths:
        if length % (2 * cp):
            raise ValueError(f"a sequence of {length} tokens is not a multiple of 2 x cp = {2 * cp}: pad it first")
        chunk = length // (2 * cp)
        for piece in (rank, 2 * cp - 1 - rank):
            parts.append(torch.arange(start + piece * chunk, start + (piece + 1) * chunk))
        start += length
    return torch.cat(parts)


def unzigzag_index(lengths: Sequence[int], cp: int, device: torch.device) -> Tensor:
    """Position of each packed token in the ranks' local tokens concatenated in rank order: `gathered[index]` is in global order."""
    gathered = torch.cat([zigzag_index(lengths, cp, rank) for rank in range(cp)])
    return torch.argsort(gathered).to(device)
