"""Writes a config.json, and reads it or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megafork.recipe import RecipeError
from megafork.shape import FAMILIES, Shape, read_shape

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "vocab_size": 99,
}
TYPES = {name: family.model_type for name, family in FAMILIES.items()}
MOE: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
PHI3: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def wrote(folder: Path, text: str | bytes) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def shape_of(folder: Path, **changes: Any) -> Shape:
    return read_shape(wrote(folder, json.dumps({**BASE, **changes})))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        shape_of(folder, **changes)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 500 and str(folder) in said
    return said
