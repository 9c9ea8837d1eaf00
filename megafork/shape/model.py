"""The shape of a dense transformer, and what the architectures that megafork trains compute."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What the models of one architecture compute, and what transformers takes where their config.json leaves a key out."""

    model_type: str
    positions: int
    """max_position_embeddings."""
    kv_heads: int | None = None
    """num_key_value_heads; None: as many as there are heads."""
    head_dim: int | None = None
    """head_dim; None: hidden_size / num_attention_heads."""
    qk_norm: bool = False
    qkv_bias: bool = False


FAMILIES = {
    "Qwen3ForCausalLM": Family("qwen3", positions=32768, kv_heads=32, head_dim=128, qk_norm=True),
    "Qwen2ForCausalLM": Family("qwen2", positions=32768, kv_heads=32, qkv_bias=True),
    "LlamaForCausalLM": Family("llama", positions=2048),
}
"""By `architectures`. All of them have RMS norms, SiLU, a gated MLP, rotary positions, and no biases but those named here."""
NORM_EPS = 1e-6
ROPE_THETA = 10000.0


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
    def qk_norm(self) -> bool:
        return FAMILIES[self.architecture].qk_norm

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.architecture].qkv_bias

    def padded_vocab(self, tp: int) -> int:
        """Rows of embedding and head: the vocabulary rounded up so that every TP rank holds equally many."""
        multiple = math.lcm(16, tp)
        return -(-self.vocab // multiple) * multiple
