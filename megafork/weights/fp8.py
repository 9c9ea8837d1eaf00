"""FP8 weights in blocks of 128 x 128 with a scale each: the form of DeepSeek's and Qwen's FP8 folders, which vLLM loads.

Projections alone are quantised; embedding, head, norms and biases stay. A block's scale maps its largest magnitude to e4m3's largest
number, 448, and is stored as its inverse in fp32 (arXiv 2412.19437, section 3.3): weight = fp8 * weight_scale_inv.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megafork.recipe import RecipeError
from megafork.shape import Shape
from megafork.weights.mapping import full_shape
from megafork.weights.shards import Spec

BLOCK = 128
SCALE = "_scale_inv"
"""What the name of a weight's scales has at its end."""
CONFIG = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
}
"""What config.json gains."""
_BAND = 8 * BLOCK
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def is_quantized(name: str) -> bool:
    """Whether a Hugging Face tensor becomes FP8."""
    return name.endswith("_proj.weight")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] to (e4m3 [rows, columns], fp32 inverse scales [rows / 128, columns / 128], rounded up)."""
    done = [_quantize_band(band) for band in weight.split(_BAND)]  # in fp32 a whole weight would be several times its size
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


def check(shape: Shape, specs: list[Spec]) -> None:
    """Refuse a model that vLLM could not load: it lays q, k, v and gate, up together, and a block must not span two of them."""
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):
        rows = full_shape(f"model.layers.0.{part}.weight", shape)[0]
        if rows % BLOCK:
            raise RecipeError(
                f"--fp8: {part} has {rows} rows, no multiple of the {BLOCK} of a block: vLLM cannot load that; leave --fp8 out"
            )
    if any(spec.dtype == torch.float32 for spec in specs):
        raise RecipeError("--fp8: the rest of the weights would be fp32, which vLLM refuses beside FP8: add --dtype bf16")


def quantized_specs(specs: Iterable[Spec]) -> list[Spec]:
    """What `quantized` gives for tensors of these specs."""
    made = []
    for spec in specs:
        if is_quantized(spec.name):
            blocks = tuple(-(-size // BLOCK) for size in spec.shape)
            made += [Spec(spec.name, spec.shape, torch.float8_e4m3fn), Spec(spec.name + SCALE, blocks, torch.float32)]
        else:
            made.append(spec)
    return made


def quantized(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, projections as two: FP8, then scales."""
    for name, tensor in tensors:
        if is_quantized(name):
            small, scale = quantize(tensor)
            yield name, small
            yield name + SCALE, scale
        else:
            yield name, tensor
