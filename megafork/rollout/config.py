"""Configuration of a roll-out engine, shared by training, evaluation, analysis and vLLM's server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megafork.model.fp8 import Quantized
from megafork.recipe import Recipe
from megafork.rollout.engine import Weights
from megafork.shape import read_shape


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Plain values, the same on every rank, already checked by the recipe or by a command's options."""

    model: str
    """Hugging Face folder. Its config.json describes the model; the weights come from `Engine.refit`."""
    dtype: str
    """fp32 or bf16."""
    longest_sequence: int
    """Maximum tokens in a prompt and its response together."""
    seed: int
    """The run's seed. Each request carries its own seed, which alone determines what is drawn."""
    tp: int = 1
    """Ranks that share an engine."""
    whole_experts: bool = False
    """Whether these ranks share the experts instead of splitting each."""
    max_running: int = 256
    """Maximum requests decoded concurrently."""
    gpu_memory_fraction: float = 0.6
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_mb: int | None = None
    """KV cache in MiB. If unset: the memory that `gpu_memory_fraction` leaves, or 256 MiB without a GPU."""
    fork_decoding: bool = False
    """Whether requests may use `Sampling.forks`; enabling it costs the engine some overlap even if no request does."""
    entropies: bool = False
    """Whether requests may ask for `Sampling.entropies`."""
    routing: bool = False
    """Whether completions carry the experts that each token took."""
    fp8: bool = False
    """Whether projections are in e4m3, quantised at every refit (`model.fp8`)."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, already checked (`recipe.vllm_engine`)."""

    @classmethod
    def of(cls, recipe: Recipe) -> EngineConfig:
        """The configuration for a recipe's roll-outs."""
        spec = recipe.rollout
        return cls(
            model=recipe.model.path,
            dtype=recipe.precision.dtype,
            longest_sequence=recipe.longest_sequence,
            seed=recipe.run.seed,
            tp=spec.tp,
            whole_experts=spec.whole_experts,
            max_running=spec.max_running,
            gpu_memory_fraction=spec.gpu_memory_fraction,
            kv_cache_mb=spec.kv_cache_mb,
            fork_decoding=spec.fork_temperature is not None,
            entropies=recipe.forks.entropy_from == "rollout",
            routing=recipe.routing_from == "rollout",
            fp8=recipe.precision.rollout_fp8,
            engine=spec.engine,
        )

    def loaded(self, weights: Weights) -> Weights:
        """The weights in the form that the engine loads: quantised on the fly for FP8. Re-iterable if `weights` is."""
        return Quantized(weights, read_shape(Path(self.model))) if self.fp8 else weights
