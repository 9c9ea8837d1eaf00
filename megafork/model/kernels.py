"""Which layers compute a model: Transformer Engine's fused ones, or plain ones (`model.kernels`)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from torch import nn

from megafork.gpus import fused_problem, installed
from megafork.recipe import Parallel, Precision, RecipeError
from megafork.recipe.model import Kernels


@dataclass(frozen=True)
class Choice:
    """The layers that this machine uses. `reason`: why they are plain."""

    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"fused, by Transformer Engine {installed('transformer-engine')}" if self.fused else f"plain, because {self.reason}"


def choose(kernels: Kernels, precision: Precision, layout: Parallel) -> Choice:
    """The layers for these keys on this machine. Raises RecipeError if they cannot be had as asked."""
    if kernels == "plain":
        return _with_layout(Choice(False, "model.kernels is plain"), layout)
    problem = fused_problem()
    if precision.dtype == "fp32":
        problem = problem or "precision.dtype is fp32"
    if kernels == "fused" and problem:
        raise RecipeError(f"model.kernels is fused but {problem}: set kernels=auto for the layers that can be had")
    return _with_layout(Choice(problem is None, problem or ""), layout)


def _with_layout(choice: Choice, layout: Parallel) -> Choice:
    if problem := layout.cp_comm_problem(fused=choice.fused):
        raise RecipeError(problem)
    return choice


def accumulate_in_main_gradients(model: nn.Module) -> None:
    """Let matrix products add the projections' weight gradients to DDP's fp32 buffers, where Transformer Engine or apex can.

    `model` must be in Megatron's DDP. Megatron's own setting concerns all layers and asks for apex even if all of them are Transformer
    Engine's.
    """
    names = ["fuse_wgrad_accumulation"]  # Transformer Engine's
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
        names.append("gradient_accumulation_fusion")  # Megatron's, by apex
    for module in model.modules():
        for name in names:
            if hasattr(module, name):
                setattr(module, name, True)
