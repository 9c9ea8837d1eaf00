"""Core attention over packed sequences in plain PyTorch, with context parallelism: equivalent to Transformer Engine's, on any device.

Layout ("thd"): the tokens of all sequences of a micro-batch are concatenated, each sequence padded to a multiple of 2 x cp. With cp > 1
every sequence is cut into 2 cp chunks and rank r holds chunks r and 2 cp - 1 - r ("zigzag"), which balances the causal work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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

from megafork.parallel.context import places_of


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, plus everything its layers need to know about lengths, computed once on the host.

    Megatron's `cu_seqlens` stay unset: with them it would read the lengths back from the device in each layer, for queries and for keys.
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

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        """The packing of sequences of these lengths without context parallelism."""
        return cls.packed(lengths, places_of(lengths, torch.arange(sum(lengths))).to(device))

    @classmethod
    def packed(cls, lengths: Sequence[int], places: Tensor, order: Tensor | None = None, **routing: Any) -> PackedSequences:
        """`routing`: `owner` and `balance`."""
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            places=places,
            order=order,
            **routing,
        )


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
        if cp == 1:
            out = torch.cat([self._causal(*part) for part in _runs(query, key, value, packed_seq_params.lengths)])
        else:
            out = self._context_parallel(query, key, value, packed_seq_params, cp)
        return out.reshape(out.size(0), -1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, n, heads, d] -> [b * n, heads, d]."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        return out.transpose(1, 2).flatten(0, 1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSequences, cp: int) -> Tensor:
        assert self.cp_group is not None and packing.order is not None
        rank = self.cp_group.rank()
        key, value = (
            gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.cp_group).index_select(0, packing.order)
            for x in (key, value)
        )
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
