"""A training step of one layer, plain and fused, in bf16 and in FP8: seconds, FLOP/s, peak memory and losses as one line of JSON. The layer
is as wide as Qwen3-32B's or, with --experts, as Qwen3-30B-A3B's, with all its experts.

    python tools/gpu/width.py FOLDER [--experts] [--dry]

FOLDER: where to write the random model. The vocabulary is small, so that the layer dominates the time.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from megafork.gpus import fused_problem
from megafork.model import precision
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh, join_world
from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.packing import packer
from megafork.shape import read_shape
from megafork.train.learner import Learner
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy

WIDTH = {"hidden_size": 5120, "intermediate_size": 25_600, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
SMALL = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
FEW_EXPERTS = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}


def negative_log_prob(log_prob: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -log_prob, {}


def measure(folder: Path, device: torch.device, *, kernels: str, fp8: bool, tokens: int, repeats: int) -> dict[str, Any]:
    """Steps on one sequence of `tokens` tokens: their median time after two uncounted steps, and the loss of each."""
    wanted = {"dtype": "bf16", "train_fp8": fp8}
    spec = Recipe.model_validate(
        {
            "model": {"path": str(folder), "recompute": "full", "kernels": kernels},
            "data": {"train": "none", "max_prompt_length": 1},
            "rollout": {"max_response_length": tokens},
            "precision": wanted,
            "reward": {"overlong": "none"},
            "optimizer": {"lr": 1e-5},
        }
    )
    mesh, shape = build_mesh(spec.parallel, seed=1, device=device), read_shape(folder)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    learner = Learner(chunks, spec, mesh, updates=repeats + 2)
    ids = torch.randint(shape.vocab, (tokens,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    pack = packer(mesh, whole=spec.micro_batch_padding, temperature=spec.rollout.temperature)
    micro = pack([Response(0, 0, 0, ids[:1], ids[1:], torch.zeros(tokens - 1), False)])
    micro.mask = torch.ones_like(micro.positions, dtype=torch.bool)
    micro.weight = micro.mask / len(micro.positions)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(learner.train([micro], negative_log_prob)["loss"])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    met = shape.moe.per_token / shape.moe.experts if shape.moe is not None else 1.0  # of the experts, by a token
    linears = {name: p.numel() for name, p in chunks[0].named_parameters() if "linear" in name}
    products = sum(size * (met if ".experts." in name else 1.0) for name, size in linears.items())
    taken = statistics.median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    # forward, its recomputation, and two products in the backward; attention is not counted
    return {"step_s": taken, "tflop_per_s": 8 * tokens * products / taken / 1e12, "peak_gb": peak / 1e9, "loss": losses}


def write(folder: Path, experts: bool, dry: bool) -> None:
    """A random model with one layer."""
    torch.manual_seed(1)
    whole = {"vocab_size": 8192, "num_hidden_layers": 1, "tie_word_embeddings": True}
    if experts:
        sparse = transformers.Qwen3MoeConfig(**(FEW_EXPERTS if dry else EXPERTS), **whole)
        transformers.Qwen3MoeForCausalLM(sparse).to(torch.bfloat16).save_pretrained(folder)
    else:
        dense = transformers.Qwen3Config(**(SMALL if dry else WIDTH), **whole)
        transformers.Qwen3ForCausalLM(dense).to(torch.bfloat16).save_pretrained(folder)


def main(folder: Path, experts: bool, dry: bool) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29652")
    device = join_world()
    write(folder, experts, dry)
    tokens, repeats = (128, 1) if dry else (8192, 8)
    found: dict[str, Any] = {}
    for kernels, fp8 in itertools.product(("plain", "fused"), (False, True)):
        if experts and fp8 and kernels == "plain":
            continue  # is refused
        lacking = (fused_problem() if kernels == "fused" else None) or (precision.lacking() if fp8 else None)
        measured = {"not run": lacking} if lacking else measure(folder, device, kernels=kernels, fp8=fp8, tokens=tokens, repeats=repeats)
        found[f"{kernels} {'fp8' if fp8 else 'bf16'}"] = measured
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--experts" in sys.argv, "--dry" in sys.argv)
