"""`rollout.engine`, and where entropies and log-probs come from: what is passed on, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from ranks import import_vllm
from tiny import recipe as tiny_recipe
from tiny import save_model

from megafork.recipe import Recipe, RecipeError
from megafork.recipe.vllm_engine import FIXED, OWN, _fields
from megafork.recipe_file import load_recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.vllm_arguments import command_line, engine_arguments
from megafork.train.remarks import mismatch

NGRAM = "{method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}"
LEAST = "model: {path: m}\ndata: {train: t.jsonl}\n"


def load(tmp_path: Path, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(LEAST)
    return load_recipe(file, list(overrides))


REFUSED: dict[tuple[str, ...], str] = {
    ("rollout.engine={max_model_len: 5}",): (
        "rollout.engine.max_model_len is 5: data.max_prompt_length and rollout.max_response_length sets this; leave it out here"
    ),
    ("rollout.engine.tensor_parallel_size=2",): "rollout.engine.tensor_parallel_size is 2: rollout.tp sets this; leave it out here",
    ("rollout.engine.quantization=fp8",): "rollout.engine.quantization is 'fp8': precision.rollout_fp8 sets this",
    ("rollout.engine.kv_cache_memory_bytes=1",): "rollout.engine.kv_cache_memory_bytes is 1: rollout.kv_cache_mb sets this",
    ("rollout.engine.logprobs_mode=raw_logprobs",): "rollout.engine.logprobs_mode is 'raw_logprobs': log-probs must be those of",
    ("rollout.engine.load_format=auto",): "rollout.engine.load_format is 'auto': the weights come from the trainer; leave it out",
    ("rollout.engine.enable_chunked_prefil=true",): (
        "rollout.engine.enable_chunked_prefil is true: vLLM's engine has no such argument; did you mean 'enable_chunked_prefill'?"
    ),
    ("rollout.engine.speculative_config={method: ngram, num_speculative_token: 3}",): (
        "rollout.engine.speculative_config.num_speculative_token is 3: vLLM has no such argument; did you mean 'num_speculative_tokens'?"
    ),
    ("rollout.engine.speculative_config=ngram",): "rollout.engine.speculative_config is 'ngram': must be a mapping, for example",
    ("rollout.engine.speculative_config={method: ngram, rejection_sample_method: synthetic}",): "rollout.engine.speculative_config is",
    ("rollout.engine=5",): "rollout.engine is 5: must be",
    (f"rollout.engine.speculative_config={NGRAM}", "rollout.fork_temperature=[0.7, 1.3, 0.5]"): (
        "rollout.engine.speculative_config is given with rollout.fork_temperature: vLLM has no logits processors under"
    ),
    ("rollout.engine.kv_cache_dtype=fp8",): "rollout.engine.kv_cache_dtype is fp8 without loss.importance_cap: tokens would count",
    (
        "forks.entropy_from=rollout",
        "rollout.fork_temperature=[0.7, 1.3, 0.5]",
    ): "forks.entropy_from is rollout with rollout.fork_temperature:",
    ("loss.old_log_prob=current", "train.minibatches=2"): "loss.old_log_prob is current with train.minibatches=2: after the first update",
    ("loss.old_log_prob=rollout", "loss.importance_cap=2"): "loss.importance_cap is 2.0 with loss.old_log_prob=rollout: p_old / p_rollout",
    ("loss.old_log_prob=old",): "loss.old_log_prob is 'old': must be",
    ("rollout.mismatch_responses=-1",): "rollout.mismatch_responses is -1: must be",
    ("precision.rollout_fp8=true", "loss.old_log_prob=rollout", "loss.objective=reinforce"): "precision.rollout_fp8 is true without loss.",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=lambda overrides: " ".join(overrides))
def test_what_is_refused_is_named(overrides: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides)
    said = str(caught.value)
    assert said.startswith(REFUSED[overrides]) and "\n" not in said


def test_what_is_passed_on(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        f"rollout.engine={{speculative_config: {NGRAM}, enable_prefix_caching: false, max_num_batched_tokens: 512}}",
        "rollout.engine.enforce_eager=true",
    )
    arguments = engine_arguments(EngineConfig.of(spec), on_gpu=True)
    assert arguments["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
    assert (arguments["enable_prefix_caching"], arguments["max_num_batched_tokens"], arguments["enforce_eager"]) == (False, 512, True)
    words = command_line(arguments)
    assert "--no-enable-prefix-caching" in words and "--enforce-eager" in words
    drafted = load(tmp_path, "rollout.engine.speculative_config={model: small, num_speculative_tokens: 3}")
    config = engine_arguments(EngineConfig.of(drafted), on_gpu=True)["speculative_config"]
    assert config == {"model": "small", "num_speculative_tokens": 3, "draft_load_config": {"load_format": "auto"}}, "no dummy weights"


def test_a_quantised_cache_counts_as_fp8(tmp_path: Path) -> None:
    spec = load(tmp_path, "rollout.engine.kv_cache_dtype=fp8", "loss.importance_cap=2")
    exact = load(tmp_path, "rollout.engine.kv_cache_dtype=bfloat16")
    kl = {"rollout_mismatch/kl": 0.04, "rollout_mismatch/max": 1.0}
    assert mismatch(kl, spec) is None and mismatch(kl, exact) is not None


def test_a_ratio_to_the_rollout_needs_no_other_correction(tmp_path: Path) -> None:
    load(tmp_path, "precision.rollout_fp8=true", "loss.old_log_prob=rollout")
    load(tmp_path, "rollout.staleness=2", "rollout.servers=[http://a:1]", "loss.old_log_prob=rollout", "forks.entropy_from=rollout")


def test_a_pass_is_needed_unless_the_rollout_gives_both(tmp_path: Path) -> None:
    sources: Any = {("old", "score"): True, ("old", "rollout"): True, ("rollout", "score"): True, ("current", "rollout"): True}
    sources |= {("rollout", "rollout"): False, ("rollout", "current"): False}
    for (entropies, old), needed in sources.items():
        spec = tiny_recipe(tmp_path, forks={"entropy_from": entropies}, loss={"old_log_prob": old}, train={"minibatches": 1})
        assert spec.scores_everything == needed


@pytest.mark.slow
def test_the_names_are_vllms() -> None:
    import_vllm()
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs) if not field.name.startswith("_")}
    assert _fields("engine/arg_utils.py", "EngineArgs") == known
    assert _fields("config/speculative.py", "SpeculativeConfig") >= {f.name for f in fields(SpeculativeConfig)}
    assert (OWN.keys() | FIXED.keys()) <= known, "each is an argument of the installed vLLM"
    free = {"enforce_eager", "disable_log_stats"}
    own = engine_arguments(EngineConfig(model="m", dtype="fp32", longest_sequence=8, seed=1), on_gpu=True).keys()
    assert own - free <= OWN.keys() | FIXED.keys(), "what megafork sets can't be set twice"


@pytest.mark.slow
def test_config_json_describes_the_model_whatever_lies_beside_it(tmp_path: Path) -> None:
    """Mistral's folders hold its own format too, which vLLM prefers."""
    import_vllm()
    from vllm.engine.arg_utils import EngineArgs

    folder = save_model(tmp_path / "m", "Mistral", sliding_window=None)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    sizes = {"dim": 64, "n_layers": 4, "head_dim": 32, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 99}
    (folder / "params.json").write_text(json.dumps({**sizes, "norm_eps": 1e-5, "rope_theta": 1e6}))
    config = EngineConfig(model=str(folder), dtype="fp32", longest_sequence=8, seed=1)
    arguments = {**engine_arguments(config, on_gpu=False), "hf_overrides": {}}  # as vllm.LLM turns None into
    read = EngineArgs(**arguments).create_model_config().hf_config
    assert (read.rope_parameters["rope_theta"], read.rms_norm_eps) == (1e4, 1e-6)
