"""Head, threshold, model and checkpoint on this device against float64, a sort, transformers, and themselves: errors as one line of JSON.

    python tools/gpu/numerics.py [--dry]

Exit code 1 if an error is over its limit.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from random_model import SIZES

from megafork.model.attention import PackedSequences
from megafork.model.build import PolicyConfig, build_policy
from megafork.model.policy import HeadRequest, Policy
from megafork.parallel.mesh import Mesh, build_mesh, join_world
from megafork.parallel.quantile import top_threshold
from megafork.parallel.vocab import log_prob_and_entropy
from megafork.recipe import Recipe
from megafork.shape import read_shape
from megafork.train.learner import Learner
from megafork.weights.checkpoint import Checkpoints
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import export_policy, load_policy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"head": 1e-4, "head gradient": 2e-2, "threshold": 0.0, "log-prob fp32": 1e-3, "log-prob bf16": 0.5, "checkpoint": 0.0}
"""Limits by prefix of the name. fp32 products may use TF32 only if torch is told to, and it is not."""


def head(device: torch.device, dtype: str, tokens: int, vocab: int) -> dict[str, float]:
    """Largest error of log-prob and entropy, and of the gradient as a share of its largest value, against float64."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 256, device=device), torch.randn(vocab, 256, device=device) * 0.2
    targets = torch.randint(vocab, (tokens,), device=device)
    given = [part.to(DTYPES[dtype]).requires_grad_() for part in (hidden, weight)]
    log_prob, entropy = log_prob_and_entropy(given[0], given[1], targets, vocab_size=vocab, group=None, entropy_grad=True)
    (log_prob.sum() + entropy.sum()).backward()
    wide = [part.detach().double().requires_grad_() for part in given]
    logs = (wide[0] @ wide[1].T).log_softmax(-1)
    wanted, spread = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)
    (wanted.sum() + spread.sum()).backward()
    ours, theirs = ([part.grad.double() for part in parts if part.grad is not None] for parts in (given, wide))
    gradients = [(one - other).abs().max() / other.abs().max() for one, other in zip(ours, theirs, strict=True)]
    error = max(float((log_prob.double() - wanted).abs().max()), float((entropy.double() - spread).abs().max()))
    return {f"head {dtype}": error, f"head gradient {dtype}": float(max(gradients))}


def threshold(device: torch.device, count: int) -> dict[str, float]:
    values = torch.rand(count, device=device) ** 4
    wanted = values.sort(descending=True).values[math.ceil(count / 5) - 1]
    return {"threshold": abs(top_threshold(values, 0.2, group=None).tau - float(wanted))}


def model(folder: Path, device: torch.device, dtype: str) -> dict[str, float]:
    """Log-probs of packed sequences against transformers in fp32, one at a time; and a checkpoint there and back."""
    spec = Recipe.model_validate({"model": {"path": str(folder)}, "data": {"train": "none"}, "precision": {"dtype": dtype}})
    mesh, shape = build_mesh(spec.parallel, seed=1, device=device), read_shape(folder)
    chunks = build_policy(shape, PolicyConfig(spec.precision), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    sequences = [torch.randint(shape.vocab, (length,), device=device) for length in (200, 3, 77)]
    lengths, packed = [len(sequence) for sequence in sequences], torch.cat(sequences)
    request = HeadRequest(torch.arange(len(packed), device=device), packed.roll(-1), torch.ones(len(packed), device=device))
    with torch.no_grad():
        found, _ = chunks[0](packed[None], None, None, labels=request, packed_seq_params=PackedSequences.of(lengths, device))
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
        wanted = torch.cat([plain(sequence[None]).logits[0].double().log_softmax(-1) for sequence in sequences])
    error = float((found.double() - wanted.gather(1, packed.roll(-1)[:, None])[:, 0]).abs().max())
    return {f"log-prob {dtype}": error, f"checkpoint {dtype}": checkpoint(chunks, spec, mesh)}


def checkpoint(chunks: list[Policy], spec: Recipe, mesh: Mesh) -> float:
    """Largest change of a weight after saving, overwriting and loading."""
    shape, learner = read_shape(Path(spec.model.path)), Learner(chunks, spec, mesh, updates=1)
    before = {name: tensor.clone() for name, tensor in export_policy(chunks, shape, mesh)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), mesh, keep_last=1)
        checkpoints.save(1, chunks, learner.optimizer, {})
        for parameter in chunks[0].parameters():
            parameter.data.zero_()
        checkpoints.load(1, chunks, learner.optimizer)
    return max(float((tensor - before[name]).abs().max()) for name, tensor in export_policy(chunks, shape, mesh))


def main(dry: bool) -> int:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29651")
    device = join_world()
    errors = threshold(device, 10_000 if dry else 50_000_000)
    for dtype in DTYPES:
        errors |= head(device, dtype, 64 if dry else 1024, 1000 if dry else 151_936)
        with tempfile.TemporaryDirectory() as folder:
            sizes = SIZES["tiny" if dry else "qwen3-0.6b"]
            config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, tie_word_embeddings=dtype == "fp32")
            transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
            errors |= model(Path(folder), device, dtype)
    over = {name: error for name, error in errors.items() if not error <= max(v for n, v in LIMITS.items() if name.startswith(n))}
    sys.stdout.write(json.dumps({"device": str(device), **errors, "over": over}) + "\n")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main("--dry" in sys.argv))
