"""vLLM's arguments, the same in the training ranks and in its own server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megafork.compat import vllm_entropy
from megafork.model.fp8 import config_entries
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Request, Sampling
from megafork.shape import read_shape

_CPU_CACHE_MB = 256


def engine_arguments(config: EngineConfig, *, on_gpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`, used both in process and by the server."""
    cache = config.kv_cache_mb or (None if on_gpu else _CPU_CACHE_MB)
    return {
        "model": config.model,
        "config_format": "hf",  # beside consolidated.safetensors vLLM would read Mistral's params.json in place of config.json
        "load_format": "dummy",  # weights come from a refit
        "skip_tokenizer_init": True,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.dtype],
        "tensor_parallel_size": config.tp,
        "enable_expert_parallel": config.whole_experts,
        "max_model_len": config.longest_sequence,
        "max_num_seqs": config.max_running,
        "gpu_memory_utilization": config.gpu_memory_fraction,
        "kv_cache_memory_bytes": cache * 2**20 if cache else None,
        "enforce_eager": not on_gpu,
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as the trainer computes them
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "seed": config.seed % 2**32,  # numpy accepts no larger seed; requests carry their own
        "disable_log_stats": True,
        "logits_processors": ["megafork.rollout.logits_processor:ForkProcessor"] if config.fork_decoding else None,
        "hf_overrides": config_entries(read_shape(Path(config.model))) if config.fp8 else None,
        **_further(config.engine),
    }


def _further(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`rollout.engine`. A draft model is read from its folder, unlike the policy."""
    speculation = arguments.get("speculative_config")
    if not speculation or "model" not in speculation:
        return dict(arguments)
    return {**arguments, "speculative_config": {"draft_load_config": {"load_format": "auto"}, **speculation}}


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """The same arguments as command-line options; None is omitted."""
    words: list[str] = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [option, json.dumps(value)]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is not None:
            words += [option, str(value)]
    return words


def sampling_arguments(request: Request, sampling: Sampling) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`: one response, with the log-prob (and entropy) of each of its tokens and no text."""
    how: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.forks is not None:
        how = {"temperature": 1.0, "extra_args": sampling.forks.arguments}
    return {
        "seed": request.seed,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop),
        "ignore_eos": True,  # `stop_token_ids` alone ends a response
        "logprobs": vllm_entropy.ASKED if sampling.entropies else 0,
        "detokenize": False,
        **how,
    }
