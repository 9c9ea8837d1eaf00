"""Peak extra memory of the head per rank, forward and backward, for 1x and 16x the tokens, measured in the CPU allocator."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from measure import peak_bytes
from megatron.core import parallel_state
from ranks import on_ranks
from torch import Tensor

from benchmarks import peers
from benchmarks.figure import Figure, Series
from benchmarks.head_time import TP, Shape, forward_backward
from megafork.parallel.vocab import log_prob_and_entropy

CHUNK = 128
GROWTH = 16
OURS = f"megafork, chunk {CHUNK}"


def run(quick: bool) -> list[Figure]:
    few, vocab = (32, 4096) if quick else (512, 18_992)  # an eighth of Qwen3's vocabulary, so that every peer fits into memory
    shapes = [Shape(tokens, 16, vocab) for tokens in (few, GROWTH * few)]
    small, large = on_ranks(TP, _peaks, shapes, timeout_s=3600)[0]
    figures = []
    for shape, peaks in zip(shapes, (small, large), strict=True):
        row = vocab / TP * 4 / 1e6  # MB for one token's logits
        where = f"peak extra memory: N {shape.tokens:,}, H {shape.hidden}, V {vocab:,}, TP {TP}"
        ours = Series(OURS, [peaks.pop(OURS)])
        for peer, peak in peaks.items():
            note = f"{peak / shape.tokens / row:.2f} of [N, V/TP]; ours {ours.values[0] / CHUNK / row:.2f} of [chunk, V/TP]"
            figures.append(Figure(where, "MB", ours, Series(peer, [peak]), note=note))
    return figures


def _peaks(shapes: list[Shape]) -> list[dict[str, float]]:
    """MB of each head, for each shape."""
    parallel_state.initialize_model_parallel(TP)
    heads = {OURS: _ours, "verl": peers.verl_head(), "Megatron-SWIFT": peers.swift_head(), "slime (described)": peers.slime_head}
    found: list[dict[str, float]] = []
    for shape in shapes:
        inputs = shape.inputs()
        found.append({})
        for name, head in heads.items():
            call = partial(forward_backward, head, *inputs, with_entropy=head is not peers.slime_head)
            call()  # compilers and first calls use extra memory
            inputs[0].grad = inputs[1].grad = None
            found[-1][name] = peak_bytes(call) / 1e6
    return found


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    vocab_size = TP * len(weight)
    return log_prob_and_entropy(hidden, weight, targets, vocab_size=vocab_size, group=dist.group.WORLD, entropy_grad=True, chunk=CHUNK)
