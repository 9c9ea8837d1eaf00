"""Quantisation of a Hugging Face folder by nvidia-modelopt, to one that vLLM loads. Needs memory for the whole model.

Of a mixture of experts modelopt quantises every projection that FP8 roll-outs do, each expert's by itself, and no router. Of the three
configs vLLM reads such a folder only in 4 bits.

Only configs calibrated on weights alone are offered: fixing the range of activations needs text typical of the model's use, which a
conversion does not have.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from megafork.convert.verify import VerifyError
from megafork.model.fp8 import is_quantized
from megafork.recipe import RecipeError
from megafork.shape import Shape, read_shape
from megafork.weights.huggingface import COMPANIONS, HuggingFaceWeights
from megafork.weights.mapping import huggingface_shapes

CONFIGS = {
    "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_blocks": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4_weights": "W4A16_NVFP4_CFG",
}
"""Names for --quantize, and modelopt's: e4m3 with a scale per row (activations: per token), e4m3 with a scale per 128 x 128 weights
(activations bf16), and 4-bit floats with a scale per 16 weights (activations bf16)."""
_NOT_OF_EXPERTS = {
    "fp8_per_channel": ("row", "choose nvfp4_weights, or --fp8"),
    "fp8_blocks": ("block", "choose --fp8, which writes the same blocks under the names that it reads"),
}
"""What modelopt's scales of experts are for, where vLLM (0.32) loads only one for a whole tensor; and the fix."""


def check_quantize(name: str, *, fp8: bool, verify: bool) -> None:
    """Raise RecipeError for an impossible request, before anything is read."""
    if name not in CONFIGS:
        raise RecipeError(f"--quantize is {name!r}: choose one of {', '.join(CONFIGS)}")
    if fp8:
        raise RecipeError(f"--quantize is {name!r} and --fp8 is set: each quantises the model; leave one out")
    if verify:
        raise RecipeError(f"--quantize is {name!r} and --verify is set: modelopt's quantised weights cannot be compared; leave one out")
    if importlib.util.find_spec("modelopt") is None:
        raise RecipeError(f"--quantize is {name!r}, but nvidia-modelopt is not installed: pip install 'megafork[quantize]'")


def check_model(name: str, shape: Shape) -> None:
    """Raise RecipeError for a model whose quantised folder vLLM could not load."""
    if shape.moe is not None and name in _NOT_OF_EXPERTS:
        part, fix = _NOT_OF_EXPERTS[name]
        raise RecipeError(f"--quantize is {name!r}: vLLM loads no experts with modelopt's scales, one for each {part}; {fix}")


def quantize_folder(source: Path, target: Path, name: str) -> None:
    """Write the model of `source`, quantised, into the existing folder `target`, next to its tokenizer's files. Raises VerifyError if
    modelopt quantised other tensors than the projections."""
    import transformers

    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    export: Any = importlib.import_module("modelopt.torch.export")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True, trust_remote_code=False)
    _forget_generation(model)
    with torch.no_grad():
        quantization.quantize(model, getattr(quantization, CONFIGS[name]))
        export.export_hf_checkpoint(model, export_dir=target)
    _check_folder(target, read_shape(source))
    (target / "generation_config.json").unlink()
    for file in COMPANIONS:
        if (source / file).exists():
            (source / file).replace(target / file)


def _forget_generation(model: Any) -> None:
    """Drop the settings of generation, which modelopt would write through transformers: that refuses them in config.json, and a
    temperature without do_sample in generation_config.json, as published folders have both. The folder's own file is copied as it is."""
    model.generation_config = type(model.generation_config)()
    for name in model.config._get_generation_parameters():
        delattr(model.config, name)


def _check_folder(folder: Path, shape: Shape) -> None:
    """Versions of transformers and modelopt that do not fit leave experts as they are, without a word."""
    names = HuggingFaceWeights(folder).names()
    for name in huggingface_shapes(shape):
        if name not in names or (f"{name}_scale" in names) != is_quantized(name, shape):
            done = "wrote no" if name not in names else "quantised" if f"{name}_scale" in names else "did not quantise"
            raise VerifyError(f"--quantize: modelopt {done} {name}: this version of transformers does not suit it; nothing was kept")
