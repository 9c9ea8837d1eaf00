"""One mini-batch's update under every layout of 2 and 4 ranks: time, padding, and the maximum memory of a rank.

Several ranks share each core here and communicate over loopback: times show the work and messages of a layout, not its gain on GPUs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import peak_bytes
from ranks import on_ranks
from tiny import recipe, save_model

from benchmarks.figure import Figure, Series, interleaved
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.parallel.reduce import over_world
from megafork.recipe import Recipe
from megafork.rl.batch import Response
from megafork.shape import read_shape
from megafork.train.learner import Learner
from megafork.train.sft import cross_entropy, place
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"1 rank": {}},
    2: {
        "DP2": {},
        "TP2": {"tp": 2},
        "TP2 SP": {"tp": 2, "sp": True},
        "PP2": {"pp": 2},
        "PP2 VPP2": {"pp": 2, "vpp": 2},
        "CP2": {"cp": 2},
    },
    4: {
        "DP4": {},
        "TP2 SP DP2": {"tp": 2, "sp": True},
        "TP4 SP": {"tp": 4, "sp": True},
        "PP2 DP2": {"pp": 2},
        "PP4": {"pp": 4},
        "TP2 SP PP2": {"tp": 2, "sp": True, "pp": 2},
        "TP2 SP CP2": {"tp": 2, "sp": True, "cp": 2},
        "PP2 CP2": {"pp": 2, "cp": 2},
    },
}


def run(quick: bool) -> list[Figure]:
    count, longest, repeats = (8, 64, 1) if quick else (48, 512, 3)
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), **SIZES)
        figures = []
        for world, layouts in LAYOUTS.items():
            for name, parallel in layouts.items():
                spec = recipe(model, parallel=parallel, train={"micro_batch_tokens": 2 * longest})
                times, extra = on_ranks(world, _cost, spec, name, count, longest, repeats, timeout_s=1800)[0]
                figures.append(Figure(f"update on {world} ranks, {name}", "s", times[name], extra=extra))
    return figures


def _responses(count: int, longest: int) -> list[Response]:
    """Responses with realistic lengths: most are short and a few reach the limit."""
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randn(count, generator=generator) * 0.8 + 4.5).exp().clamp(16, longest - 32).long().tolist()
    draw = [torch.randint(0, SIZES["vocab_size"], (32 + n,), generator=generator, dtype=torch.int32) for n in lengths]
    return [Response(n, 0, n, tokens[:32], tokens[32:], torch.zeros(len(tokens) - 32), False) for n, tokens in enumerate(draw)]


def _cost(spec: Recipe, name: str, count: int, longest: int, repeats: int) -> tuple[dict[str, Series], dict[str, float]]:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    folder = Path(spec.model.path)
    shape = read_shape(folder)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    learner = Learner(chunks, spec, mesh, updates=100)
    micros = place(_responses(count, longest), spec, mesh)
    times = interleaved({name: lambda: learner.train(micros, cross_entropy)}, repeats)
    held = sum(p.numel() for chunk in chunks for p in chunk.parameters()) * 8  # fp32 weights and gradients
    held += sum(t.nbytes for state in learner.optimizer.chained_optimizers[0].optimizer.state.values() for t in state.values())
    padded = sum(sum(micro.lengths) for micro in micros)
    padding = sum(micro.padding for micro in micros)
    total, waste = over_world([padded, padding], mesh)
    most_held, most_extra = over_world([held, peak_bytes(lambda: learner.train(micros, cross_entropy))], mesh, "max")
    tokens = (total - waste) / mesh.layout.model_size  # these ranks receive the same micro-batches
    return times, {
        "tokens_per_s": tokens / sorted(times[name].values)[len(times[name].values) // 2],
        "padding_percent": 100 * waste / total,
        "weights_gradients_optimizer_mb": most_held / 1e6,
        "peak_extra_mb": most_extra / 1e6,
    }
