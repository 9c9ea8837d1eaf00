"""Attention over sequences of 200 distinct lengths, forward and backward: seconds of a first and of a later pass, as one line of JSON.

    python tools/gpu/attention.py [--dry]

Ways: torch's attention once for each length, by cuDNN, which plans for each new shape; torch's FlashAttention and Transformer Engine, once
a micro-batch. Heads are those of Qwen3-32B on a rank of TP 8. Exit code 1 if two ways disagree.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megafork.gpus import fused_problem
from megafork.model import attention
from megafork.model.attention import PackedSequences
from megafork.model.build import PolicyConfig, build_chunks
from megafork.parallel.mesh import Mesh, build_mesh, join_world
from megafork.plan.models import KNOWN
from megafork.recipe import Parallel, Precision

SHAPE = replace(KNOWN["qwen3-32b"], layers=1, hidden=1024, ffn=1024, vocab=1024, heads=8, kv_heads=1)
LIMIT = 0.05
"""Largest difference between outputs, which are about 1."""


def micro_batches(count: int, longest: int, tokens: int) -> list[list[int]]:
    """`count` distinct lengths, packed in order into micro-batches of at most `tokens`."""
    packed: list[list[int]] = [[]]
    for length in range(longest // count, longest + 1, longest // count):
        if sum(packed[-1]) + length > tokens:
            packed.append([])
        packed[-1].append(length)
    return packed


def self_attention(mesh: Mesh, kernels: str) -> Any:
    """A layer's, for its core attention."""
    [chunk] = build_chunks(SHAPE, PolicyConfig(Precision(dtype="bf16")), mesh, fused=kernels == "fused")
    return chunk.decoder.layers[0].self_attention


@contextlib.contextmanager
def each_length(device: torch.device) -> Iterator[None]:
    """A call for each run of equal lengths instead of one a micro-batch, on a GPU by cuDNN."""
    one_call, attention.in_one_call = attention.in_one_call, lambda query: False
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else contextlib.nullcontext():
        yield
    attention.in_one_call = one_call


def measure(
    compute: Callable[[list[Tensor], PackedSequences], Tensor], batches: list[list[int]], mesh: Mesh
) -> tuple[dict[str, float], Tensor]:
    """Seconds of passes over all micro-batches, and the output of the last micro-batch."""
    generator, seconds = torch.Generator().manual_seed(1), []
    longest = max(map(sum, batches))
    sizes = ((longest, heads, SHAPE.head_dim) for heads in (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads))
    inputs = [torch.randn(size, generator=generator).to(mesh.device, torch.bfloat16) for size in sizes]
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for lengths in batches:
            part = [whole[: sum(lengths)].detach().requires_grad_() for whole in inputs]
            out = compute(part, PackedSequences.of(lengths, mesh.device))
            out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"first_s": seconds[0], "later_s": statistics.median(seconds[1:])}, out.detach().float()


def main(dry: bool) -> int:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29653")
    mesh = build_mesh(Parallel(), seed=1, device=join_world())
    batches = micro_batches(4, 64, 96) if dry else micro_batches(200, 8000, 20480)
    on_gpu = mesh.device.type == "cuda"
    layer = cache(partial(self_attention, mesh))

    def by_torch(inputs: list[Tensor], packing: PackedSequences) -> Tensor:
        return layer("plain").core_attention(*inputs, None, packed_seq_params=packing.for_plain_layers(1, 0))

    def by_transformer_engine(inputs: list[Tensor], packing: PackedSequences) -> Tensor:
        fused = layer("fused")
        return fused.core_attention(*inputs, None, attn_mask_type=fused.attn_mask_type, packed_seq_params=packing.for_fused_layers())

    outputs: list[Tensor] = []

    def figures(lacking: str | None, compute: Callable[[list[Tensor], PackedSequences], Tensor]) -> dict[str, Any]:
        if lacking:
            return {"not run": lacking}
        seconds, out = measure(compute, batches, mesh)
        outputs.append(out.flatten())
        return seconds | {"difference": float((out.flatten() - outputs[0]).abs().max())}

    found: dict[str, Any] = {"lengths": sum(map(len, batches)), "tokens": sum(map(sum, batches))}
    found["one call"] = figures(None if on_gpu else "there is no GPU", by_torch)
    found["Transformer Engine"] = figures(fused_problem(), by_transformer_engine)
    with each_length(mesh.device):
        try:
            found["each length"] = figures(None, by_torch)
        except RuntimeError as error:  # cuDNN has no kernel for these heads
            found["each length"] = {"not run": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")
    return not all(way.get("difference", 0.0) <= LIMIT for way in found.values() if isinstance(way, dict))


if __name__ == "__main__":
    sys.exit(main("--dry" in sys.argv))
