"""Quantisation by nvidia-modelopt: a Hugging Face folder to one that vLLM loads. The whole model is held in memory.

Only configs that look at weights alone are offered: one that fixes the range of activations wants text like that of the model's use, which
a conversion does not have.
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
"""What --quantize names, and modelopt's name for it: e4m3 with a scale a row (activations a token), e4m3 with a scale for 128 x 128 weights
(activations bf16), and 4-bit floats with a scale for 16 weights (activations bf16)."""


def check_quantize(name: str, *, fp8: bool, verify: bool) -> None:
    """Refuse what cannot be done before anything is read. Raises RecipeError."""
    if name not in CONFIGS:
        raise RecipeError(f"--quantize is {name!r}: choose one of {', '.join(CONFIGS)}")
    if fp8:
        raise RecipeError(f"--quantize is {name!r} and --fp8 is set: each quantises by itself; leave one out")
    if verify:
        raise RecipeError(f"--quantize is {name!r} and --verify is set: what modelopt rounds is not compared; leave one out")
    if importlib.util.find_spec("modelopt") is None:
        raise RecipeError(f"--quantize is {name!r}, but nvidia-modelopt is not installed: pip install 'megafork[quantize]'")


def quantize_folder(source: Path, target: Path, name: str) -> None:
    """Write the model of `source`, quantised, into the existing folder `target`, beside its tokenizer's files."""
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
