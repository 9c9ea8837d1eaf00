"""The shape of a dense transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megafork.shape.families import FAMILIES
from megafork.shape.family import Family


@dataclass(frozen=True)
class Llama3:
    """Rotary frequencies of Llama 3.1 and later: slow ones divided by `factor`, fast ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies of YaRN (arXiv 2309.00071): as Llama 3's, but interpolated over dimensions, with sharper attention."""

    factor: float
    original_positions: int
    attention_factor: float
    """Of queries and keys each, so that attention scores grow by its square."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the dimensions between which frequencies are interpolated are rounded outwards to whole ones."""

    @property
    def positions(self) -> int:
        """How many positions it stretches the model to."""
        return int(self.factor * self.original_positions)


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense transformer, in Hugging Face's meaning."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3 | Yarn | None
    max_positions: int
    """Tokens of the longest sequence; with YaRN what it stretches the model to."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    def padded_vocab(self, tp: int) -> int:
        """Rows of embedding and head: the vocabulary rounded up so that every TP rank holds equally many."""
        multiple = math.lcm(16, tp)
        return -(-self.vocab // multiple) * multiple
