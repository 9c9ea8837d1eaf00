"""Core attention over packed sequences in plain PyTorch, with context parallelism: equivalent to Transformer Engine's, on any device.

On a GPU in bf16 it is one call of torch's FlashAttention per layer, whatever the lengths: for each new length, cuDNN, which torch's other
attention uses there, would first make a plan. The CPU, and fp32, have no such kernel: equally long neighbours are computed together.

Layout ("thd"): the tokens of all sequences of a micro-batch are concatenated, each sequence padded to a multiple of 2 x cp. With cp > 1
every sequence is cut into 2 cp chunks and rank r holds chunks r and 2 cp - 1 - r ("zigzag"), which balances the causal work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from megafork.parallel.context import places_of
from megafork.parallel.to_device import to_device


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, plus everything its layers need to know about lengths, computed once on the host.

    In plain layers Megatron's `cu_seqlens` stay unset: with them it would read the lengths back from the device in each layer, for queries
    and for keys. Fused layers need them (`for_fused_layers`).
    """

    lengths: tuple[int, ...] = ()
    """Padded length in tokens of each sequence, summed over all CP ranks."""
    places: Tensor | None = None
    """int64 [T / cp]: the position, within its sequence, of each token that this rank holds."""
    order: Tensor | None = None
    """int64 [T], with context parallelism: the index of each token in the concatenation of all ranks' tokens (`unzigzag_index`)."""
    owner: Tensor | None = None
    """int64 [T / cp], for routers: the number of the sequence that each token belongs to, -1 for padding."""
    balance: float = 0.0
    """Weight of each sequence's balancing loss, for routers."""
    routing: Tensor | None = None
    """int16 [T / cp, layers, k]: the experts that each token takes in each layer, -1 where the router chooses; None: everywhere."""
    note_routing: bool = False
    """Whether routers choose, and write their choice into `routing`."""
    edges: Tensor | None = None
    """int32 [sequences + 1]: where each sequence starts among all T tokens, and the end of the last."""
    pieces: Pieces | None = None
    """What an attention call of plain layers on a GPU is given."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        """The packing of sequences of these lengths without context parallelism."""
        return cls.packed(lengths, places_of(lengths, torch.arange(sum(lengths))).to(device))

    @classmethod
    def packed(cls, lengths: Sequence[int], places: Tensor, order: Tensor | None = None, **routing: Any) -> PackedSequences:
        """`routing`: `owner`, `balance`, `routing` and `note_routing`."""
        longest = max(lengths)
        edges = to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), places.device)
        found = cls(lengths=tuple(lengths), places=places, order=order, edges=edges, **routing)
        found.qkv_format, found.max_seqlen_q, found.max_seqlen_kv = "thd", longest, longest
        return found

    def for_plain_layers(self, cp: int, rank: int) -> PackedSequences:
        """The packing with the pieces of CP rank `rank`, so that no layer has to move indices to the device."""
        found = copy(self)
        found.pieces = Pieces.of(self, cp, rank)
        return found

    def for_fused_layers(self) -> PackedSequences:
        """The packing as Transformer Engine reads it: padded lengths count as lengths, and CP ranks hold the same zigzag chunks.

        Padded and other lengths are the same tensor: torch sees that without comparing them on the device, for which each layer would wait.
        """
        found = copy(self)
        found.cu_seqlens_q = found.cu_seqlens_kv = found.cu_seqlens_q_padded = found.cu_seqlens_kv_padded = self.edges
        return found


@dataclass(frozen=True)
class Pieces:
    """A rank's queries in pieces of adjacent tokens, each with the keys up to its end: what one attention call is given."""

    queries: Tensor
    """int32 [pieces + 1]: where each piece's queries start, and the end of the last."""
    keys: Tensor
    """int32 [pieces + 1]: the same for its keys."""
    longest: tuple[int, int]
    """Most queries and most keys of a piece."""
    seen: Tensor | None = None
    """int64 [keys], with context parallelism: the index of each key in the concatenation of all ranks' keys."""

    @classmethod
    def of(cls, packing: PackedSequences, cp: int, rank: int) -> Pieces:
        """The pieces of CP rank `rank`: whole sequences or, with context parallelism, the two chunks of each that it holds."""
        if cp == 1:
            assert packing.edges is not None
            return cls(packing.edges, packing.edges, (packing.max_seqlen_q, packing.max_seqlen_q))
        assert packing.order is not None
        counts, parts, start = [], [], 0
        for length in packing.lengths:
            chunk = length // (2 * cp)
            for place in (rank, 2 * cp - 1 - rank):
                counts.append((chunk, (place + 1) * chunk))
                parts.append(torch.arange(start, start + (place + 1) * chunk))
            start += length
        device = packing.order.device
        queries, keys = (
            to_device(torch.tensor([0, *itertools.accumulate(count)], dtype=torch.int32), device) for count in zip(*counts, strict=True)
        )
        longest = (max(queries for queries, _ in counts), max(keys for _, keys in counts))
        return cls(queries, keys, longest, packing.order.index_select(0, to_device(torch.cat(parts), device)))


def in_one_call(query: Tensor) -> bool:
    """Whether FlashAttention can compute this query's attention."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.size(-1) % 8 == 0 and query.size(-1) <= 256


class PackedCoreAttention(MegatronModule):
    """Causal attention within each packed sequence.

    All CP ranks must call together: keys and values are gathered over the CP group (backward: reduce-scatter).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        packed_seq_params: PackedSequences,
        **unused: Any,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv heads, d] of this rank -> [T, heads * d]."""
        cp = self.cp_group.size() if self.cp_group is not None else 1
        if in_one_call(query):
            out = self._in_one_call(query, key, value, packed_seq_params.pieces)
        elif cp == 1:
            out = torch.cat([self._causal(*part) for part in _runs(query, key, value, packed_seq_params.lengths)])
        else:
            out = self._context_parallel(query, key, value, packed_seq_params, cp)
        return out.reshape(out.size(0), -1)

    def _in_one_call(self, query: Tensor, key: Tensor, value: Tensor, pieces: Pieces | None) -> Tensor:
        """[T, heads, d], as `query`. The kernel aligns a piece's last query with its last key."""
        assert pieces is not None
        if pieces.seen is not None:
            key, value = (self._gathered(x).index_select(0, pieces.seen) for x in (key, value))
        edges = (pieces.queries, pieces.keys, *pieces.longest)
        out = varlen_attn(query, key, value, *edges, scale=self.scale, window_size=(-1, 0), enable_gqa=query.size(1) != key.size(1))
        assert isinstance(out, Tensor)
        return out

    def _gathered(self, local: Tensor) -> Tensor:
        """Keys or values of all CP ranks, in the order of the ranks."""
        return gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self.cp_group)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, n, heads, d] -> [b * n, heads, d]."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        return out.transpose(1, 2).flatten(0, 1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences, cp: int) -> Tensor:
        assert self.cp_group is not None and packing.order is not None
        rank = self.cp_group.rank()
        key, value = (self._gathered(x).index_select(0, packing.order) for x in (key, value))
        outs, local, start = [], 0, 0
        for length in packing.lengths:
            chunk = length // (2 * cp)
            for piece in (rank, 2 * cp - 1 - rank):
                seen = slice(start, start + (piece + 1) * chunk)
                q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query[local : local + chunk], key[seen], value[seen]))
                mask = causal_lower_right(q.size(2), k.size(2))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
                outs.append(out.squeeze(0).transpose(0, 1))
                local += chunk
            start += length
        return torch.cat(outs)


def _runs(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of each run of adjacent equal-length sequences as a batch [b, n, heads, d]: views, no copies."""
    runs, start = [], 0
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        part = slice(start, start + count * length)
        q, k, v = (x[part].unflatten(0, (count, length)) for x in (query, key, value))
        runs.append((q, k, v))
        start += count * length
    return runs
