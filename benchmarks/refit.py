"""Transfer of new weights to the roll-out engines in the same ranks: our bridge, a gather of every tensor on every rank, and via the disk.

The first rows are timed with real vLLM engines. The last are counted from the plan for Qwen3-32B in bf16 on 64 GPUs, 8 per node: the data
received by the busiest rank, and the total traffic between nodes; `megafork plan --refit` counts the same for any model. A rank must
receive whatever its engine loads that it does not hold itself, and a node whatever its engines load and none of its ranks holds; the plan
moves exactly that (`tests/test_reshard.py`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import free_port, on_ranks
from tiny import Chosen, recipe, save_model

from benchmarks.figure import Figure, Series, interleaved
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.plan.models import KNOWN
from megafork.plan.refit import COMPARED, ENGINES, Refit, cost, cost_of_full_gather, count_refit
from megafork.recipe import Recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Weights
from megafork.shape import read_shape
from megafork.weights.huggingface import HuggingFaceWeights, write_folder
from megafork.weights.policy_weights import export_policy, load_policy
from megafork.weights.refit import Bridge

OURS, GATHER, DISK = "bridge", "full gather", "write and read a folder"
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "TP2": (2, {"tp": 2}, 2),
    "TP2 to TP1": (2, {"tp": 2}, 1),
    "PP2 to TP2": (2, {"pp": 2}, 2),
    "TP2 PP2 to TP2": (4, {"tp": 2, "pp": 2}, 2),
}


def run(quick: bool) -> list[Figure]:
    sizes, repeats = ({}, 1) if quick else (SIZES, 5)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", tie_word_embeddings=False, **sizes)
        for name, (world, parallel, tp) in LAYOUTS.items():
            spec = recipe(model, parallel=parallel, rollout={"tp": tp, "max_response_length": 32, "kv_cache_mb": 16})
            times, received = on_ranks(world, _times, spec, Path(folder) / "out", repeats, free_port(), timeout_s=1800)[0]
            megabytes = {way: Series(way, [count / 1e6]) for way, count in received.items()}
            figures += [Figure(f"refit, {name}", "s", times[OURS], times[way]) for way in (GATHER, DISK)]
            figures.append(Figure(f"refit, {name}: received by a rank", "MB", megabytes[OURS], megabytes[GATHER]))
    counted = (count_refit(KNOWN["qwen3-32b"], layout, 64, tp) for layout in COMPARED for tp in ENGINES)
    return figures + [_figure(refit) for refit in counted]


def _times(spec: Recipe, out: Path, repeats: int, port: int) -> tuple[dict[str, Series], dict[str, int]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.rollout.colocated import ColocatedEngine

    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    folder = Path(spec.model.path)
    shape = read_shape(folder)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    bridge = Bridge(chunks, shape, mesh, spec.rollout.tp)
    weights = Chosen(bridge)
    engine = ColocatedEngine(EngineConfig.of(spec), mesh, weights)

    def refit(source: Weights) -> None:
        weights.source = source
        engine.refit(1)

    def through_disk() -> None:
        weights = export_policy(chunks, shape, mesh)
        if mesh.is_rank_zero:
            write_folder(out, weights, like=folder)
        else:
            for _ in weights:
                pass
        dist.barrier()
        saved = HuggingFaceWeights(out)
        refit((name, saved.read(name, (0, saved.shape(name)[0]))) for name in sorted(saved.names()))
        dist.barrier()

    calls = {
        OURS: lambda: refit(bridge),
        GATHER: lambda: refit(export_policy(chunks, shape, mesh)),
        DISK: through_disk,
    }
    times = interleaved(calls, repeats)
    engine.close()
    width = next(chunks[0].parameters()).element_size()
    return times, {OURS: cost(bridge.plan).received * width, GATHER: cost_of_full_gather(bridge.plan).received * width}


def _figure(refit: Refit) -> Figure:
    ours, gather, least = refit.plan, refit.gather, refit.least
    gigabytes = refit.width / 1e9
    return Figure(
        f"Qwen3-32B, {refit.gpus} GPUs, {refit.name}: received by the busiest rank",
        "GB",
        Series(OURS, [ours.received * gigabytes]),
        Series(GATHER, [gather.received * gigabytes]),
        note="counted, not run",
        extra={
            "least_gb": least.received * gigabytes,
            "between_nodes_gb": ours.between_nodes * gigabytes,
            "between_nodes_least_gb": least.between_nodes * gigabytes,
            "between_nodes_full_gather_gb": gather.between_nodes * gigabytes,
        },
    )
