"""FP8 training: Transformer Engine multiplies the projections in e4m3, with one scale per block (arXiv 2412.19437, section 3.3).

Megatron accepts `fp8` without Transformer Engine and then silently trains in bf16. Here such a recipe is refused.
"""

from __future__ import annotations

from typing import Any

from megafork.gpus import fused_problem
from megafork.model.fp8 import BLOCK
from megafork.recipe import Parallel, Precision, RecipeError
from megafork.recipe.model import Kernels
from megafork.shape import Family, Shape


def lacking() -> str | None:
    """The reason why this machine cannot train in FP8, or None if it can."""
    if problem := fused_problem():
        return problem
    from transformer_engine.pytorch import is_fp8_block_scaling_available

    able, reason = is_fp8_block_scaling_available(return_reason=True)
    return None if able else reason


def check_training(shape: Shape, precision: Precision, layout: Parallel, kernels: Kernels) -> None:
    """Refuse `precision.train_fp8` if a rank's part of a projection does not consist of whole blocks, and for experts in plain layers.

    Raises RecipeError. The rows of an expert's tokens are no whole blocks; Megatron pads them to what the products need.
    """
    if not precision.train_fp8:
        return
    if shape.moe is not None and kernels == "plain":
        raise RecipeError(
            "precision.train_fp8 is true with model.kernels=plain: experts multiply in FP8 in fused layers only; set kernels=auto, or "
            "train_fp8=false"
        )
    tp, heads, groups = layout.tp, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"hidden": shape.hidden, "qkv": (heads + 2 * groups) // tp, "attention": heads // tp}
    _check_sizes("tp", tp, sizes | ({"mlp": shape.ffn // tp} if shape.has_mlp else {}))
    if shape.moe is not None:
        _check_sizes("tp" if layout.ep == 1 else "etp", layout.expert_tp, {"expert": shape.moe.ffn // layout.expert_tp})


def _check_sizes(key: str, ranks: int, sizes: dict[str, int]) -> None:
    for part, size in sizes.items():
        if size % BLOCK:
            fix = f"choose a smaller {key}, or train_fp8=false" if ranks > 1 else "set train_fp8=false"
            raise RecipeError(
                f"precision.train_fp8 is true: at parallel.{key}={ranks} a rank's {part} size is {size}, no multiple of the {BLOCK} of a "
                f"block: {fix}"
            )


def check_machine(precision: Precision) -> None:
    """Refuse `precision.train_fp8` on a machine that cannot train in FP8. Raises RecipeError."""
    if precision.train_fp8 and (reason := lacking()):
        raise RecipeError(f"precision.train_fp8 is true but {reason}: train on a machine that has it, or set train_fp8=false")


def settings(precision: Precision) -> dict[str, Any]:
    """FP8 settings of Megatron's TransformerConfig. Parameters stay bf16 (`fp8_param`): refit, checkpoints and optimizer read them."""
    return {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": False} if precision.train_fp8 else {}


def projections(family: Family) -> dict[str, type]:
    """Transformer Engine's class for each projection of a plain layer, keyed by Megatron's name for the module; parameters keep their
    names and shapes. Norms and attention remain ours, not in FP8."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return {rule.module: TERowParallelLinear if rule.kind == "row" else TEColumnParallelLinear for rule in family.layer if rule.fp8}
