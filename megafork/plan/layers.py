"""Fused and plain layers in the plan: which a recipe gets on a GPU, and how many more bytes plain ones read and write.

Matrix products, norms, attention and SwiGLU are one kernel each in both. What differs is counted in passes over tensors: rotary positions,
the gradient of SwiGLU, which torch.compile generates for plain layers and in mixtures, the sorting of tokens by expert, and the addition of
weight gradients to fp32 buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megafork.plan import experts
from megafork.plan.hardware import STREAM_SHARE, Gpu
from megafork.plan.parameters import WIDTH, layer_parameters
from megafork.recipe import Recipe
from megafork.shape import Shape

Layers = Literal["fused", "plain", "cpu"]
"""`cpu`: plain layers as the CPU computes them, with which the closed forms of activations are checked."""


def layers_of(recipe: Recipe) -> Layers:
    """The layers on a GPU with Transformer Engine, as `model.kernels.choose` takes them."""
    return "fused" if recipe.model.kernels != "plain" and recipe.precision.dtype == "bf16" else "plain"


@dataclass(frozen=True)
class Traffic:
    """Bytes that a plain layer moves on a rank and a fused one does not."""

    forward: float
    """Per token."""
    backward: float
    """Per token."""
    weights: float
    """Per micro-batch's backward."""

    def seconds(self, gpu: Gpu, tokens: float, *, forwards: float, backwards: float) -> float:
        """Of one layer and micro-batch."""
        moved = tokens * (forwards * self.forward + backwards * self.backward) + backwards * self.weights
        return moved / (gpu.bandwidth * STREAM_SHARE)


def more_than_fused(shape: Shape, recipe: Recipe, *, sparse: bool = False) -> Traffic:
    """The traffic that fusing saves in each layer, or in each layer with experts (`sparse`)."""
    if layers_of(recipe) == "fused":
        return Traffic(0.0, 0.0, 0.0)
    layout, width = recipe.parallel, WIDTH[recipe.precision.dtype]
    tp = layout.tp
    shared, of_experts = layer_parameters(shape, sparse=sparse)
    inner = 0.0 if shape.moe is not None else width * shape.ffn / tp
    moved = experts.moved_by_plain(shape, layout, width) if sparse else 0.0
    rotated = width * (shape.heads / tp + max(shape.kv_heads / tp, 1)) * shape.head_dim
    angles = 2 * 2 * (5 * 4 + width) * shape.head_dim  # cosines and sines, times 1, rounded, for queries and for keys
    parameters = shared / tp + of_experts / (layout.ep * layout.expert_tp)
    return Traffic(
        # Rotary: 12 passes (2 products of 2, half negated 1, joined 2, sum 3, joined again 2) for 2
        # SwiGLU: 3 for 3
        forward=(12 - 2) * rotated + angles + moved,
        # Rotary: 14 (2 products of 2, half negated 1, joined 2, sum 3, nothing beyond the rotated part: 1, added 3) for 2
        # SwiGLU: 7 (torch.compile's kernel loads the gate and the product's gradient twice) for 5
        backward=(14 - 2) * rotated + (7 - 5) * inner + moved,
        weights=2 * width * parameters,  # a gradient is written before it is added
    )
