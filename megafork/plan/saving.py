"""A checkpoint's size, and what writing it takes of a rank and of a step. Sizes are counted; the time is an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megafork.plan.hardware import GLOO, GPUS_PER_NODE, STORAGE
from megafork.plan.parameters import WIDTH, Weights, count_parameters
from megafork.recipe import Recipe
from megafork.shape import Shape

_KINDS = 3
"""The fp32 weights and Adam's two moments: `weights/optimizer_state.py`."""


@dataclass(frozen=True)
class Saving:
    """One checkpoint."""

    total: int
    """Bytes of its files, without vocabulary padding."""
    written: int
    """Bytes that a rank of the largest stage writes: its share of what its data-parallel replicas hold together."""
    host: int
    """Most host memory that a rank needs, in bytes: what it writes, and one kind of optimizer state on its way to the rank that keeps
    it."""
    seconds: float


def saving(shape: Shape, recipe: Recipe, gpus: int, weights: list[Weights]) -> Saving:
    """`weights`: of each pipeline stage."""
    width = WIDTH[recipe.precision.dtype] + 4 * _KINDS
    total = count_parameters(shape) * width
    largest = max(weights, key=lambda stage: stage.state_written)
    share = largest.state_written
    exchanged = 4 * _KINDS * sum(kind.parameters / kind.shards * (kind.shards - 1) / kind.shards for kind in largest.kinds)
    seconds = total / (math.ceil(gpus / GPUS_PER_NODE) * STORAGE) + exchanged / GLOO
    return Saving(total, int(share * width), int(share * (width + 2 * 4)), seconds)
