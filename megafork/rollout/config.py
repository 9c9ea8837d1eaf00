"""What a roll-out engine is made from: for training, evaluation, analysis and vLLM's server alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megafork.model.fp8 import Quantized
from megafork.recipe import Recipe
from megafork.rollout.engine import Weights
from megafork.shape import read_shape


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Plain values, the same on every rank. Checked already, by the recipe or by a command's options."""

    model: str
    """Hugging Face folder. Its config.json describes the model; weights come by `Engine.refit`."""
    dtype: str
    """fp32 or bf16."""
    longest_sequence: int
    """Tokens of a prompt and its response together."""
    seed: int
    """Of the run. Each request carries one of its own, which alone decides what is drawn."""
    tp: int = 1
    """Ranks that share an engine."""
    max_running: int = 256
    """Requests decoded at once."""
    gpu_memory_fraction: float = 0.6
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_mb: int | None = None
    """KV cache in MiB. None: what `gpu_memory_fraction` leaves, or 256 without a GPU."""
    fork_decoding: bool = False
    """Whether requests may ask for `Sampling.forks`, which costs an engine some of its overlap even where none does."""
    fp8: bool = False
    """Projections in e4m3, quantised at every refit (`model.fp8`)."""

    @classmethod
    def of(cls, recipe: Recipe) -> EngineConfig:
        """As the recipe's roll-outs need it."""
        spec = recipe.rollout
        return cls(
            model=recipe.model.path,
            dtype=recipe.precision.dtype,
            longest_sequence=recipe.longest_sequence,
            seed=recipe.run.seed,
            tp=spec.tp,
            max_running=spec.max_running,
            gpu_memory_fraction=spec.gpu_memory_fraction,
            kv_cache_mb=spec.kv_cache_mb,
            fork_decoding=spec.fork_temperature is not None,
            fp8=recipe.precision.rollout_fp8,
        )

    def loaded(self, weights: Weights) -> Weights:
        """The same weights as the engine loads them: for FP8 quantised on the way. As often iterable."""
        return Quantized(weights, read_shape(Path(self.model))) if self.fp8 else weights
