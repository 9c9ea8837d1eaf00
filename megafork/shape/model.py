"""The shape of a transformer, dense or with a mixture of experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megafork.shape.families import FAMILIES
from megafork.shape.family import Family


@dataclass(frozen=True)
class Llama3:
    """Rotary frequencies of Llama 3.1 and later: low ones divided by `factor`, high ones kept, those in between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies of YaRN (arXiv 2309.00071): like Llama 3's, but interpolated over dimensions, and with sharper attention."""

    factor: float
    original_positions: int
    attention_factor: float
    """Factor on both queries and keys, so attention scores are scaled by its square."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the bounds of the interpolated range of dimensions are rounded outwards to integers."""

    @property
    def positions(self) -> int:
        """Number of positions to which it extends the model."""
        return int(self.factor * self.original_positions)


@dataclass(frozen=True)
class Mixture:
    """The experts that take the place of the MLP in some layers."""

    experts: int
    """Experts of each such layer."""
    per_token: int
    """Experts that compute each token."""
    ffn: int
    """Intermediate size of an expert."""
    normalized: bool
    """Whether the weights of a token's experts are divided by their sum."""
    layers: tuple[int, ...]
    """The layers that have experts; the others have an MLP."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer, as Hugging Face defines them."""

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
    """Maximum tokens per sequence; with YaRN, the extended number."""
    moe: Mixture | None = None
    """The mixture of experts; None for a dense model."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def mixture(self) -> Mixture:
        """The mixture of a model that has one."""
        assert self.moe is not None, "a dense model has no experts"
        return self.moe

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of an MLP."""
        return self.moe is not None and layer in self.moe.layers

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has an MLP in place of experts."""
        return self.moe is None or len(self.moe.layers) < self.layers

    def padded_vocab(self, tp: int) -> int:
        """Rows of embedding and head: the vocabulary size, rounded up to a multiple of 16 and of `tp` so that TP ranks hold equal parts."""
        multiple = math.lcm(16, tp)
        return -(-self.vocab // multiple) * multiple
