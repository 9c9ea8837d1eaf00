"""A model's rotary positions: the frequencies that result from its rope scaling, and the scale of its attention scores.

Frequencies match transformers' and vLLM's bit for bit, in their order of operations: at position 100,000 a relative error of 1e-7 in a
frequency rotates a head by 0.01 radians.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megafork.model.attention import PackedSequences
from megafork.shape import Llama3, Shape, Yarn


def inverse_frequencies(shape: Shape) -> Tensor:
    """The rotation of each pair of a head's dimensions per position: radians, fp32 [head_dim / 2], on the CPU."""
    wavelengths = shape.rope_theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)  # over 2 pi
    match shape.rope_scaling:
        case Llama3() as scaling:
            return _llama3(1.0 / wavelengths, scaling)
        case Yarn() as scaling:
            return _yarn(wavelengths, scaling, shape)
        case _:
            return 1.0 / wavelengths


class PackedRotary(nn.Module):
    """Replacement for Megatron's `RotaryEmbedding`: computes the angles of a packed micro-batch's tokens once for all layers."""

    def __init__(self, frequencies: Tensor) -> None:
        """`frequencies`: fp32 [head_dim / 2], `inverse_frequencies` on the model's device."""
        super().__init__()
        self.frequencies = frequencies

    def get_rotary_seq_len(self, context: Any, block: Any, hidden: Any, config: Any, packing: PackedSequences, **unused: Any) -> Any:
        """The argument with which Megatron calls `forward`."""
        return packing

    def forward(self, packing: PackedSequences, **unused: Any) -> Tensor:
        """Angles of the tokens that this rank holds, fp32 [T / cp, 1, head_dim]; each angle appears twice, once per half of a head."""
        assert packing.places is not None
        angles = torch.outer(packing.places.float(), self.frequencies)
        return torch.cat((angles, angles), -1)[:, None]


class FusedRotary(PackedRotary):
    """The angles for Transformer Engine's kernel, which finds each token's place in its sequence itself, also in CP's zigzag chunks."""

    def forward(self, packing: PackedSequences, **unused: Any) -> Tensor:
        """Angles by place, fp32 [longest sequence, 1, 1, head_dim]; each angle appears twice, once per half of a head."""
        places = torch.arange(packing.max_seqlen_q, dtype=torch.float32, device=self.frequencies.device)
        angles = torch.outer(places, self.frequencies)
        return torch.cat((angles, angles), -1)[:, None, None]


def softmax_scale(shape: Shape) -> float:
    """The factor on attention scores. YaRN scales both queries and keys; rotation preserves that, so its square is applied here, once."""
    factor = shape.rope_scaling.attention_factor if isinstance(shape.rope_scaling, Yarn) else 1.0
    return factor**2 / math.sqrt(shape.head_dim)


def _llama3(plain: Tensor, scaling: Llama3) -> Tensor:
    wavelengths = 2 * math.pi / plain
    turns = scaling.original_positions / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - kept) * plain / scaling.factor + kept * plain
    slow = wavelengths > scaling.original_positions / scaling.low_freq_factor
    fast = wavelengths < scaling.original_positions / scaling.high_freq_factor
    return torch.where(slow, plain / scaling.factor, torch.where(fast, plain, between))


def _yarn(wavelengths: Tensor, scaling: Yarn, shape: Shape) -> Tensor:
    """Section 3.2 of the paper, but with the ramp over dimension indices instead of rotation counts, as in every implementation."""

    def pair(turns: float) -> float:
        """The (fractional) index of the pair of dimensions that makes this many turns within the original positions."""
        per_turn = scaling.original_positions / (turns * 2 * math.pi)
        return shape.head_dim * math.log(per_turn) / (2 * math.log(shape.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, shape.head_dim - 1)
    pairs = torch.arange(len(wavelengths), dtype=torch.float32)
    kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
