"""FP8 roll-outs: the refit quantises exactly as the converter does, and a whole run works with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from command import run_on_forks
from fp8 import EXPERTS, WIDE, reference
from ranks import free_port, on_ranks
from task import make_task, write_recipe
from tiny import PROMPTS, recipe, save_model
from training import Rig

from megafork.commands import preflight
from megafork.convert.convert import megatron_to_hf
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.weights.huggingface import write_folder
from megafork.weights.refit import Bridge

HEADS_FOR_TWO: dict[str, Any] = {**WIDE, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Sizes whose halves blocks fit."""
SOME_DENSE: dict[str, Any] = {"mlp_only_layers": [0, 2]}


def refitted_and_fresh(spec: Recipe, port: int) -> list[list[Completion]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.rollout.colocated import ColocatedEngine

    rig = Rig(spec)
    bridge = Bridge(rig.learner.chunks, rig.shape, rig.mesh, spec.rollout.tp, whole_experts=spec.rollout.whole_experts)
    engine = ColocatedEngine(EngineConfig.of(spec), rig.mesh, bridge)
    for update in (1, 2):
        rig.step(update)
        rig.learner.settle()
        engine.refit(update)
    weights = rig.weights()
    folder = Path(spec.model.path).parent / "exported"
    if rig.mesh.is_rank_zero:
        write_folder(folder, weights.items(), like=Path(spec.model.path))
        megatron_to_hf(folder, folder.with_name("fp8"), fp8=True)
    dist.barrier()

    class FromFolder(ColocatedEngine):
        def _arguments(self, *arguments: Any) -> dict[str, Any]:
            own = {"load_format": "auto", "model": str(folder.with_name("fp8")), "hf_overrides": None}
            return {**super()._arguments(*arguments), **own}

    fresh = FromFolder(EngineConfig.of(spec), rig.mesh, ())
    fresh._llm.llm_engine.set_weight_version("2")
    requests = [Request(prompt, 1) for prompt in PROMPTS]
    return [one.generate(requests, Sampling(max_tokens=8, temperature=0.0)) for one in (engine, fresh)]


SPLIT: dict[str, Any] = {"ep": 2, "tp": 2, "sp": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sizes", "parallel", "engines"),
    [
        ("Qwen3", HEADS_FOR_TWO, {"tp": 2}, {"tp": 1}),
        ("Qwen3", HEADS_FOR_TWO, {"pp": 2}, {"tp": 2}),
        ("Phi3", HEADS_FOR_TWO, {"pp": 2}, {"tp": 2}),
        ("Qwen3Moe", EXPERTS, {"ep": 2}, {"tp": 1}),
        ("Qwen3Moe", {**EXPERTS, **HEADS_FOR_TWO}, SPLIT, {"tp": 2}),
        ("Qwen3Moe", {**EXPERTS, **HEADS_FOR_TWO, "moe_intermediate_size": 128, **SOME_DENSE}, SPLIT, {"tp": 2, "whole_experts": True}),
    ],
    ids=["TP2 to TP1", "PP2 to TP2", "fused, PP2 to TP2", "EP2 to TP1", "EP2 to TP2", "EP2 to EP2, some layers dense"],
)
def test_a_refitted_engine_is_one_that_loaded_the_fp8_folder(
    architecture: str, sizes: dict[str, Any], parallel: dict[str, Any], engines: dict[str, Any], tmp_path: Path
) -> None:
    spec = recipe(
        save_model(tmp_path / "model", architecture, **sizes),
        parallel=parallel,
        precision={"dtype": "bf16", "rollout_fp8": True},
        loss={"importance_cap": 2.0},
        rollout={**engines, "max_response_length": 32, "kv_cache_mb": 16},
        train={"micro_batch_tokens": 64},
        optimizer={"lr": 1e-2, "eps": 1e-2},
    )
    for refitted, fresh in on_ranks(2, refitted_and_fresh, spec, free_port(), engines=True):
        assert [(c.tokens, c.log_probs) for c in refitted] == [(c.tokens, c.log_probs) for c in fresh]
        drawn = [prompt + completion.tokens for prompt, completion in zip(PROMPTS, refitted, strict=True)]
        found = torch.tensor([completion.log_probs for completion in refitted])
        wanted = (reference(tmp_path / "exported", fp8=fp8, sequences=drawn) for fp8 in (True, False))
        from_fp8, from_bf16 = (float((found - torch.stack([one[-8:] for one in each])).abs().mean()) for each in wanted)
        assert from_fp8 < 0.25 and from_fp8 < 0.8 * from_bf16, "it computes what the blocks say, whichever rank holds them"


@pytest.mark.slow
def test_a_run_with_fp8_roll_outs(tmp_path: Path) -> None:
    """vLLM's log-probs are off by what FP8 rounds away, and the loss makes up for it."""
    mismatch = {"token_mask": [0.9, 1.1], "veto": 1e-4}  # some of the tokens are outside, never all
    steps = trained(make_task(tmp_path, **WIDE), loss={"mismatch": mismatch}, forks={"select": "all"})
    assert all(1e-3 < step["rollout_mismatch/max"] < 2 and step["loss/importance"] != 1 for step in steps)
    assert all(0 < step["loss/masked_fraction"] < 1 and 0.5 < step["rollout_mismatch/ess"] < 1 for step in steps)


@pytest.mark.slow
def test_a_run_of_a_mixture_with_fp8_roll_outs(tmp_path: Path) -> None:
    """The routers' inputs are off too, so the engine chooses other experts, which the trainer replays."""
    task = make_task(tmp_path, architecture="Qwen3Moe", **EXPERTS)
    steps = trained(task, rollout={"routing": "replay"}, loss={})
    assert all(1e-3 < step["rollout_mismatch/max"] < 2 and step["loss/importance"] != 1 for step in steps)
    assert any(step["experts/replaced"] > 0 for step in steps)


def trained(task: Path, *, loss: dict[str, Any], **sections: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that updated the policy, of a run with FP8 roll-outs."""
    (task / "verifier.py").write_text("def score(response, row):\n    return float(len(response.split()) % 2)\n")
    fp8: dict[str, Any] = {"precision": {"dtype": "bf16", "rollout_fp8": True}, "loss": {"importance_cap": 2.0, **loss}}
    run_on_forks("train", write_recipe(task, reward={"verifier": f"{task}/verifier.py:score"}, **fp8, **sections))
    steps = [json.loads(line) for line in (task / "runs/run/metrics.jsonl").read_text().splitlines()][1:]
    updates = [step for step in steps if "loss/policy" in step]
    assert updates
    return updates


def test_what_fp8_needs(tmp_path: Path) -> None:
    file = write_recipe(make_task(tmp_path))
    on = ["precision.rollout_fp8=true", "precision.dtype=bf16", "loss.importance_cap=2"]
    with pytest.raises(RecipeError, match=r"^precision\.rollout_fp8 is true with precision\.dtype=fp32"):
        load_recipe(file, on[:1])
    with pytest.raises(RecipeError, match=r"^precision\.rollout_fp8 is true without loss\.importance_cap"):
        load_recipe(file, on[:2])
    with pytest.raises(RecipeError, match=r"^precision\.rollout_fp8 is true: k_proj has 64 rows a rank, no multiple of the 128"):
        preflight("train", load_recipe(file, on), 1)
