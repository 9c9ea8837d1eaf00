"""Core attention over packed sequences in plain PyTorch, with context parallelism: equivalent to Transformer Engine's, on any device.

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
    edges: Tensor | None = None
    """int32 [sequences + 1]: where each sequence starts among all T tokens, and the end of the last."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        """The packing of sequences of these lengths without context parallelism."""
        return cls.packed(lengths, places_of(lengths, torch.arange(sum(lengths))).to(device))

    @classmethod
    def packed(cls, lengths: Sequence[int], places: Tensor, order: Tensor | None = None) -> PackedSequences:
        longest = max(lengths)
        edges = to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), places.device)
        found = cls(lengths=tuple(lengths), places=places, order=order, edges=edges)
        found.qkv_format, found.max_seqlen_q, found.max_seqlen_kv = "thd", longest, longest
        return found

    def for_fused_layers(self) -> PackedSequences:
        """The packing as Transformer Engine reads it: padded lengths count as lengths, and CP ranks hold the same zigzag chunks.

        Padded and other lengths are the same tensor: torch sees that without comparing them on the device, for which each layer would wait.
        """
        found = copy(self)
        found.cu_seqlens_q = found.cu_seqlens_kv = found.cu_seqlens_q_padded = found.cu_seqlens_kv_padded = self.edges
        return found


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
