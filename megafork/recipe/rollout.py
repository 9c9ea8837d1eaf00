"""How responses are drawn."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from megafork.recipe.kinds import (
    Count,
    CountOrZero,
    Fraction,
    Megabytes,
    NonNegative,
    Positive,
    Ranks,
    Seconds,
    Section,
    Temperature,
    Tokens,
)
from megafork.recipe.vllm_engine import cache_is_quantised, engine_problem

MOST_RESPONSES = 10_000_000
"""Responses per step."""


class Rollout(Section):
    prompts: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    """Prompts per step."""
    samples: Annotated[int, Field(ge=1, le=1 << 16)] = 16
    """G, responses to each prompt."""
    max_response_length: Tokens = 20480
    """Maximum tokens in a response, end-of-sequence included."""
    temperature: Temperature = 1.0
    """T of the roll-out; log-probs and entropies are taken at the same T."""
    fork_temperature: Annotated[tuple[Temperature, Temperature, NonNegative], Field(strict=False)] | None = None
    """[low, high, threshold], replaces `temperature`: `high` at tokens whose entropy at temperature 1 is above `threshold` nats (the
    paper's 0.672), `low` elsewhere. Log-probs are then taken at each token's own temperature, entropies at 1."""
    tp: Ranks = 1
    """Tensor parallel size of a vLLM engine; world size / tp engines serve the roll-out."""
    whole_experts: bool = False
    """Of a mixture of experts: an engine's `tp` ranks share its experts, each whole (vLLM's expert parallelism), instead of splitting every
    expert."""
    dynamic_sampling: bool = True
    """Drop groups whose responses are all right or all wrong, and sample others."""
    max_refills: CountOrZero = 10
    """Maximum additional rounds of dynamic sampling before the step trains on the groups it has."""
    max_empty_steps: Count = 10
    """Steps in a row with nothing to learn from (each group all right or all wrong, or no token selected) after which the run ends, with a
    checkpoint."""
    max_mismatch: Positive | None = None
    """KL between vLLM's and the trainer's log-probs at equal weights, in nats per token, above which the first step stops the run before it
    trains. Unset: 1e-4 in fp32, 0.01 in bf16, 0.05 with FP8."""
    mismatch_responses: CountOrZero = 16
    """Responses per step that the trainer scores only to compare (`rollout_mismatch/*` in the metrics), where `forks.entropy_from` and
    `loss.old_log_prob` make a scoring pass needless. 0: none; only the first step scores 16, for `max_mismatch`."""
    kv_cache_mb: Megabytes | None = None
    """KV cache per engine in MiB. Unset: limited by `gpu_memory_fraction` of the GPU, or 256 without a GPU."""
    gpu_memory_fraction: Fraction = 0.6
    """Share of a GPU's memory for vLLM's weights and KV cache."""
    park_training: bool = False
    """Move gradients and optimizer state off the GPU while vLLM uses it: room for a larger `gpu_memory_fraction`, at the cost of a host
    round trip per step. Not with `servers`, which have their own GPUs."""
    routing: Literal["none", "replay"] = "none"
    """Of a mixture of experts. replay: scoring and updates send each token to the experts that vLLM chose for it, so that the two compute
    the same function of nearly equal weights; the weights of the experts, and their gradients, are the trainer's. With `servers`, which
    do not tell their choice, updates replay that of the scoring pass. none: routers choose anew."""
    max_running: Count = 256
    """Requests that an engine decodes at once."""
    engine: dict[str, JsonValue] = Field(default={})
    """Further arguments of vLLM's engine by vLLM's own names (`EngineArgs`), such as `speculative_config`, `max_num_batched_tokens` or
    `kv_cache_dtype`. Those that the recipe sets elsewhere, and those that would change the model, are refused (docs/cluster.md)."""
    servers: list[str] = Field(default=[])
    """Addresses (`http://HOST:PORT`) of vLLM servers, each started by `python -m megafork.rollout.serve RECIPE`; those on other
    machines share the secret MEGAFORK_SECRET with the trainer. If empty, engines run in the trainer's own processes."""
    staleness: CountOrZero = 0
    """Steps by which the weights that generate a token may lag behind: this many steps are rolled out ahead, while others train, and switch
    to new weights when these arrive. 0: each step uses the latest weights. Above 0 it needs `servers` and `loss.importance_cap`."""
    request_limit_s: Seconds = 3600.0
    """Time limit in seconds for one response from a server. Beyond it, another server is tried."""
    server_limit_s: Seconds = 300.0
    """Seconds that a server may take for its part of a refit, and that a run may continue without any server."""

    @property
    def cache_is_quantised(self) -> bool:
        """Whether vLLM's KV cache has fewer bits than its activations."""
        return cache_is_quantised(self.engine)

    @field_validator("servers")
    @classmethod
    def _are_addresses(cls, servers: list[str]) -> list[str]:
        for url in servers:
            address = re.fullmatch(r"http://[^/:\s?#@]+:(\d{1,5})", url)
            if address is None or not 0 < int(address[1]) < 1 << 16:
                raise ValueError(f"rollout.servers has {url!r}: give addresses such as http://node1:8000")
        if len(set(servers)) < len(servers):
            raise ValueError(f"rollout.servers is {servers}: it names a server twice")
        return servers

    @model_validator(mode="after")
    def _keys_agree(self) -> Rollout:
        if self.prompts * self.samples > MOST_RESPONSES:
            raise ValueError(
                f"rollout.prompts x rollout.samples is {self.prompts} x {self.samples}: a step of more than {MOST_RESPONSES:,} responses "
                "is surely a mistake; choose fewer"
            )
        if self.fork_temperature and self.temperature != 1:
            raise ValueError(f"rollout.temperature is {self.temperature} but rollout.fork_temperature replaces it: drop one of them")
        if self.staleness and not self.servers:
            raise ValueError(
                f"rollout.staleness is {self.staleness} without rollout.servers: engines in the trainer's own processes can't roll out "
                "ahead; name servers, or set rollout.staleness=0"
            )
        if problem := engine_problem(self.engine):
            raise ValueError(f"rollout.engine{problem}")
        if self.engine.get("speculative_config") and self.fork_temperature:
            raise ValueError(
                "rollout.engine.speculative_config is given with rollout.fork_temperature: vLLM has no logits processors under speculative "
                "decoding; drop one of them"
            )
        if self.park_training and self.servers:
            raise ValueError("rollout.park_training is true with rollout.servers: servers have their own GPUs; set it to false")
        return self
