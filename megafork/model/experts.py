"""Megatron's mixture-of-experts layers, for the models that have experts: every token goes to its experts, none is dropped.

The router computes in fp32, and the load is not balanced by a bias or a loss of Megatron's. Experts run one after the other
(`SequentialMLP`).
"""

from __future__ import annotations

from typing import Any

from megafork.compat import experts as fixes
from megafork.recipe import Parallel
from megafork.shape import Shape


def settings(shape: Shape, layout: Parallel) -> dict[str, Any]:
    """The experts' settings of Megatron's TransformerConfig; none for a dense model."""
    if shape.moe is None:
        return {}
    fixes.run_without_transformer_engine()
    fixes.read_splits_on_host()
    return {
        "num_moe_experts": shape.moe.experts,
        "moe_layer_freq": _frequency(shape),
        "moe_ffn_hidden_size": shape.moe.ffn,
        "moe_router_topk": shape.moe.per_token,
        "moe_router_pre_softmax": not shape.moe.normalized,  # the softmax of the chosen logits is the normalised one
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def _frequency(shape: Shape) -> int | list[int]:
    """Which layers have experts; 1: all of them, whose parameters a checkpoint then stacks as it does a dense model's."""
    sparse = [int(shape.is_sparse(layer)) for layer in range(shape.layers)]
    return sparse if 0 in sparse else 1
