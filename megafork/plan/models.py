"""Shapes of models that may not be downloaded yet, from their public config.json on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megafork.recipe import Recipe, RecipeError
from megafork.shape import Mixture, Shape, read_shape


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool = False, positions: int = 32768) -> Shape:
    return Shape(
        architecture="Qwen3ForCausalLM",
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        vocab=151936,
        tied=tied,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=positions,
    )


def _qwen3_moe(layers: int, hidden: int, ffn: int, heads: int, expert: int) -> Shape:
    """`expert`: the intermediate size of each of 128 experts, of which 8 compute a token."""
    mixture = Mixture(experts=128, per_token=8, ffn=expert, normalized=True, layers=tuple(range(layers)))
    dense = _qwen3(layers, hidden, ffn, heads, positions=40960)
    return replace(dense, architecture="Qwen3MoeForCausalLM", kv_heads=4, moe=mixture)


KNOWN = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, positions=40960),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 6144, 32, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 12288, 64, 1536),
}


def shape_for(recipe: Recipe) -> tuple[Shape, str]:
    """The model's shape and its source: config.json in model.path, or, without that folder, the last part of model.path, with or without
    `-Base`, as a known name. Raises RecipeError if neither is found."""
    folder = Path(recipe.model.path)
    if folder.is_dir():
        return read_shape(folder), f"{folder}/config.json"
    known = KNOWN.get(folder.name.lower().removesuffix("-base"))
    if known is None:
        raise RecipeError(
            f"model.path is {recipe.model.path!r}: no such folder, and not one of the models whose shape the planner knows by name "
            f"({', '.join(KNOWN)}): download it, or plan with the closest of them"
        )
    return known, f"the planner's table: {folder} is not on this machine"
