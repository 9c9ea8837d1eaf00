"""FP8 folders (`model/fp8.py` defines the blocks): which models can be written as one, and its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megafork.model.fp8 import BLOCK, SCALE, check_blocks, is_quantized
from megafork.recipe import RecipeError
from megafork.shape import Shape
from megafork.weights.shards import Spec


def check_folder(shape: Shape, specs: list[Spec]) -> None:
    """Raise RecipeError for a model that vLLM could not load."""
    check_blocks(shape, 1, "--fp8")
    if any(spec.dtype == torch.float32 for spec in specs):
        raise RecipeError("--fp8: the rest of the weights would be fp32, which vLLM refuses together with FP8: add --dtype bf16")


def quantized_specs(shape: Shape, specs: Iterable[Spec]) -> list[Spec]:
    """Specs of the tensors that `Quantized` yields for tensors of these specs."""
    made = []
    for spec in specs:
        if is_quantized(spec.name, shape):
            blocks = tuple(-(-size // BLOCK) for size in spec.shape)
            made += [Spec(spec.name, spec.shape, torch.float8_e4m3fn), Spec(spec.name + SCALE, blocks, torch.float32)]
        else:
            made.append(spec)
    return made
