"""The layers of Transformer Engine, through Megatron's own layer spec: fewer passes over memory than plain layers, for the same numbers.

Norms of the residual stream are part of the projections behind them, attention takes packed sequences with context parallelism, and
rotary positions, norms of queries and keys, and SwiGLU are one kernel each. A rank's experts are multiplied together, and one kernel each
sorts tokens by expert and adds up, in fp32, what a token's experts made of it. Needs a GPU to run, not to be built.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megafork.model import experts
from megafork.recipe import Parallel
from megafork.shape import Shape


def settings(layout: Parallel) -> dict[str, Any]:
    """Megatron's settings for fused layers."""
    return {"apply_rope_fusion": True, "cp_comm_type": layout.cp_comm or "p2p"}


def layer(shape: Shape, *, sparse: bool) -> ModuleSpec:
    """Megatron's spec of a layer of Transformer Engine's modules, with experts (`sparse`) or without."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.mixture.experts if sparse else None, moe_grouped_gemm=sparse, qk_layernorm=shape.family.qk_norm
    )
    if sparse:
        experts.route(spec)
    else:
        spec.submodules.mlp.submodules.activation_func = SwiGLU  # if `use_te_activation_func`
    return spec


def final_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


class SwiGLU(MegatronModule):
    """silu(gate) * up of [..., gate and up] in one pass, and its gradient in another; only the input is kept for the backward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        from transformer_engine.pytorch.ops import SwiGLU as Operation

        self._operation = (Operation(),)  # a tuple hides it: without parameters, it would still add a state to checkpoints

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return self._operation[0](gate_and_up)
