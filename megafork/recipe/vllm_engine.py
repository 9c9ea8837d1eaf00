"""Checks `rollout.engine`: arguments of vLLM's engine that megafork passes on unread, by the names in vLLM's own source."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megafork.did_you_mean import did_you_mean
from megafork.recipe.kinds import shown

OWN = {
    "model": "model.path",
    "dtype": "precision.dtype",
    "quantization": "precision.rollout_fp8",
    "hf_overrides": "precision.rollout_fp8",
    "tensor_parallel_size": "rollout.tp",
    "enable_expert_parallel": "rollout.whole_experts",
    "max_model_len": "data.max_prompt_length and rollout.max_response_length",
    "max_num_seqs": "rollout.max_running",
    "gpu_memory_utilization": "rollout.gpu_memory_fraction",
    "kv_cache_memory_bytes": "rollout.kv_cache_mb",
    "logits_processors": "rollout.fork_temperature",
    "weight_transfer_config": "rollout.servers",
    "enable_return_routed_experts": "rollout.routing",
    "aux_output_config": "rollout.routing",
    "seed": "run.seed",
    "override_generation_config": "rollout.temperature",
    "generation_config": "rollout.temperature",
}
"""Arguments that megafork sets from the recipe, and the key that does it."""
FIXED = {
    **dict.fromkeys(("load_format", "model_weights", "model_loader_extra_config"), "the weights come from the trainer"),
    **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), "the engine is given token ids"),
    **dict.fromkeys(("revision", "code_revision", "config_format", "hf_config_path"), "model.path alone describes the model"),
    **dict.fromkeys(("logprobs_mode", "max_logprobs"), "log-probs must be those of the distribution that was sampled"),
    **dict.fromkeys(("distributed_executor_backend", "worker_cls", "worker_extension_cls"), "megafork starts the workers"),
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size", "nnodes", "node_rank"), "world size / rollout.tp engines are made"),
    **dict.fromkeys(
        ("prefill_context_parallel_size", "decode_context_parallel_size", "expert_placement_strategy", "enable_eplb", "model_impl"),
        "the refit knows only vLLM's own split over rollout.tp ranks",
    ),
    **dict.fromkeys(
        (
            "disable_sliding_window",
            "quantization_config",
            "enable_lora",
            "watermark_config",
            "enable_trace_replay",
            "model_class_overrides",
        ),
        "it would be another model, or another distribution, than the trainer's",
    ),
    **dict.fromkeys(("runner", "convert", "pooler_config", "diffusion_config", "scheduler_cls"), "the engine must generate"),
    **dict.fromkeys(("cpu_offload_gb", "cpu_offload_params", "offload_backend"), "the refit writes to weights on the device"),
    **dict.fromkeys(("enable_sleep_mode", "sleep_mode_offload_cudagraph"), "megafork frees the engine's memory while it trains"),
    **dict.fromkeys(("spec_method", "spec_model", "spec_tokens"), "give them in speculative_config"),
    "trust_remote_code": "it would run code from model.path",
}
"""Arguments that a recipe can't change, and why."""
_EXACT_CACHE = ("auto", "float16", "bfloat16", "float32")


def engine_problem(arguments: Mapping[str, Any]) -> str | None:
    """Why vLLM's engine can't get these arguments: the rest of a sentence that begins with `rollout.engine`. None if nothing is wrong."""
    known = _fields("engine/arg_utils.py", "EngineArgs")
    for name, value in arguments.items():
        said = f".{name} is {shown(value)}: "
        if name in OWN:
            return f"{said}{OWN[name]} sets this; leave it out here"
        if name in FIXED:
            return f"{said}{FIXED[name]}; leave it out"
        if known and name not in known:
            return f"{said}vLLM's engine has no such argument; {did_you_mean(name, known, 'leave it out')}"
    return _speculation_problem(arguments.get("speculative_config"))


def cache_is_quantised(arguments: Mapping[str, Any]) -> bool:
    """Whether the KV cache is stored in fewer bits than the activations, so that log-probs are only about the trainer's."""
    return arguments.get("kv_cache_dtype", "auto") not in _EXACT_CACHE


def _speculation_problem(config: Any) -> str | None:
    if config is None:
        return None
    said = f".speculative_config is {shown(config)}: "
    if not isinstance(config, dict):
        return f"{said}must be a mapping, for example {{method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}}"
    known = _fields("config/speculative.py", "SpeculativeConfig")
    for name, value in config.items():
        if known and name not in known:
            return f".speculative_config.{name} is {shown(value)}: vLLM has no such argument; {did_you_mean(name, known, 'leave it out')}"
    if config.get("rejection_sample_method") == "synthetic":
        return f"{said}`synthetic` accepts tokens that the model did not draw; use rejection_sample_method=standard or block"
    return None


@cache
def _fields(file: str, name: str) -> frozenset[str]:
    """The fields of one of vLLM's classes, read from its source, for importing vLLM takes seconds; empty where vLLM is not installed."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(next(iter(spec.submodule_search_locations)), file)
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name]
    fields = [node.target.id for node in classes[0].body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return frozenset(field for field in fields if not field.startswith("_"))
