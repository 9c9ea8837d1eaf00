"""A CPU kernel for torch's `varlen_attn`, which has only FlashAttention's: what its documentation says, by a plain product for each piece.

A piece's last query is aligned with its last key, as in FlashAttention from 2.1 on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def install() -> None:
    """Let the CPU run `varlen_attn`, forward and backward."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _pieces(query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Iterator[tuple[slice, slice, Any]]:
    """Each piece's rows of the queries and keys; and its queries, keys, values [heads, n, d] and probabilities, in fp32."""
    for (start, stop), (first, last) in zip(itertools.pairwise(queries.tolist()), itertools.pairwise(keys.tolist()), strict=True):
        group = query.size(1) // key.size(1)
        q = query[start:stop].float().transpose(0, 1)
        k, v = (x[first:last].float().repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
        unseen = torch.ones(stop - start, last - first, dtype=torch.bool).triu(1 + (last - first) - (stop - start))
        yield slice(start, stop), slice(first, last), (q, k, v, (scale * q @ k.mT).masked_fill(unseen, -torch.inf).softmax(-1))


def _forward(query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    longest_query, longest_key, causal, scale, window = rest[:5]
    assert causal and window == [-1, 0]
    assert longest_query == int(queries.diff().max()) and longest_key == int(keys.diff().max())
    assert queries.dtype == keys.dtype == torch.int32 and (int(queries[-1]), int(keys[-1])) == (len(query), len(key))
    out = torch.empty_like(query)
    for rows, _, (_, _, v, share) in _pieces(query, key, value, queries, keys, scale):
        out[rows] = (share @ v).transpose(0, 1).to(out.dtype)
    return out, torch.zeros(query.size(1), query.size(0)), torch.zeros(2, dtype=torch.uint64)


def _backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    queries, keys, _, _, _, _, scale = rest[:7]
    found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for rows, seen, (q, k, v, share) in _pieces(query, key, value, queries, keys, scale):
        g = gradient[rows].float().transpose(0, 1)
        change = g @ v.mT
        scores = scale * share * (change - (change * share).sum(-1, keepdim=True))
        found[0][rows] = (scores @ k).transpose(0, 1).to(query.dtype)
        for target, each in ((found[1], scores.mT @ q), (found[2], share.mT @ g)):
            target[seen] = each.unflatten(0, (key.size(1), -1)).sum(1).transpose(0, 1).to(key.dtype)
    return found
