"""FP8 weights in blocks of 128 x 128 with one scale per block: the format of DeepSeek's and Qwen's FP8 folders, which vLLM loads.

Only projections are quantised, each expert's by itself, not the embedding, head, norms, biases and routers. A block's scale maps its
largest magnitude to e4m3's largest number, 448, and its inverse is stored in fp32 (arXiv 2412.19437, section 3.3): weight = fp8 *
weight_scale_inv.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megafork.recipe import Recipe, RecipeError
from megafork.shape import Rule, Shape

BLOCK = 128
SCALE = "_scale_inv"
"""Suffix of the name of a weight's scales."""
_BAND = 8 * BLOCK
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def config_entries(shape: Shape) -> dict[str, Any]:
    """Entries added to config.json. vLLM quantises every linear that they do not list by its full name, so a mixture's routers are listed,
    as in Qwen's FP8 folders."""
    family = shape.family
    routers = [tensor for rule in family.sparse_layer for tensor in rule.tensors if tensor.columns and not rule.fp8]
    sparse = shape.moe.layers if shape.moe else ()
    kept = {family.head.tensors[0].module, *(family.hf_name(each, n).removesuffix(".weight") for each in routers for n in sparse)}
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return {"quantization_config": {**how, "modules_to_not_convert": sorted(kept)}}


def is_quantized(name: str, shape: Shape) -> bool:
    """Whether a Hugging Face tensor is quantised to FP8."""
    found = shape.family.find(name)
    return found is not None and found[0].fp8


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weight [rows, columns] to (e4m3 [rows, columns], fp32 inverse scales [rows / 128, columns / 128], rounded up)."""
    done = [_quantize_band(band) for band in weight.split(_BAND)]  # a whole weight in fp32 would take several times its memory
    return torch.cat([small for small, _ in done]), torch.cat([scale for _, scale in done])


def _quantize_band(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [row block, row, column block, column]
    largest = blocks.abs().amax((1, 3))
    scale = torch.where(largest > 0, largest / _LARGEST, 1.0)
    scaled = (blocks / scale[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
    return scaled.to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)[:rows, :columns], scale


def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
    """The weight in fp32."""
    rows, columns = quantized.shape
    wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return quantized.float() * wide


def check_blocks(shape: Shape, tp: int, field: str, *, whole_experts: bool = False) -> None:
    """Refuse a model that vLLM could not load on `tp` ranks: each block must lie within one rank's part of one projection.

    Raises RecipeError. `field`: the setting that requested FP8, for the message. `whole_experts`: these ranks share the experts instead of
    splitting each.
    """
    family = shape.family
    for rule in family.layer if shape.has_mlp else family.sparse_layer:
        _check_rule(rule, shape, tp, field, "do without")
    for rule in family.experts:
        fix = "set rollout.whole_experts=true, or do without" if tp > 1 and not whole_experts else "do without"
        _check_rule(rule, shape, 1 if whole_experts else tp, field, fix)
    if shape.moe and shape.hidden % BLOCK:
        raise RecipeError(
            f"{field}: the model's hidden_size is {shape.hidden}, no multiple of {BLOCK}: vLLM cannot quantise the inputs of experts in "
            f"groups of {BLOCK}; do without"
        )


def _check_rule(rule: Rule, shape: Shape, tp: int, field: str, fix: str) -> None:
    for tensor in rule.tensors if rule.fp8 else ():
        for axis in tensor.rows:
            start, stop = axis.part(shape, tp, 0)
            if axis.split != "whole" and (stop - start) % BLOCK:
                whose = f" of {axis.name}" if len(tensor.rows) > 1 else ""
                owner = "an expert's " if rule in shape.family.experts else ""
                raise RecipeError(
                    f"{field}: {owner}{tensor.module} has {stop - start} rows{whose} a rank, no multiple of the {BLOCK} of a block: vLLM "
                    f"cannot load that; {fix}"
                )


def check_rollouts(shape: Shape, recipe: Recipe) -> None:
    """Refuse `precision.rollout_fp8` for a model that vLLM could not load on `rollout.tp` ranks. Raises RecipeError."""
    if recipe.precision.rollout_fp8:
        check_blocks(shape, recipe.rollout.tp, "precision.rollout_fp8 is true", whole_experts=recipe.rollout.whole_experts)


class Quantized:
    """(Hugging Face name, tensor) pairs, each projection replaced by two: FP8 weight, then scales. Re-iterable if `tensors` is."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], shape: Shape) -> None:
        self.tensors = tensors
        self.shape = shape

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            if is_quantized(name, self.shape):
                small, scale = quantize(tensor)
                yield name, small
                yield name + SCALE, scale
            else:
                yield name, tensor
