"""Quantisation of a Hugging Face folder by nvidia-modelopt, to one that vLLM loads. Needs memory for the whole model.

Only configs calibrated on weights alone are offered: fixing the range of activations needs text typical of the model's use, which a
conversion does not have.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from megafork.recipe import RecipeError
from megafork.weights.huggingface import COMPANIONS

CONFIGS = {
    "fp8_per_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_blocks": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4_weights": "W4A16_NVFP4_CFG",
}
"""Names for --quantize, and modelopt's: e4m3 with a scale per row (activations: per token), e4m3 with a scale per 128 x 128 weights
(activations bf16), and 4-bit floats with a scale per 16 weights (activations bf16)."""


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


def quantize_folder(source: Path, target: Path, name: str) -> None:
    """Write the model of `source`, quantised, into the existing folder `target`, next to its tokenizer's files."""
    import transformers

    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    export: Any = importlib.import_module("modelopt.torch.export")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True, trust_remote_code=False)
    with torch.no_grad():
        quantization.quantize(model, getattr(quantization, CONFIGS[name]))
        export.export_hf_checkpoint(model, export_dir=target)
    for file in COMPANIONS:
        if (source / file).exists():
            (source / file).replace(target / file)
