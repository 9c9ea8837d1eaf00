"""Kernels for block-wise FP8 weights on CPUs, slow ones that compute what the GPU kernels compute.

With them FP8 folders and FP8 refits can be tested without a GPU, and give the same numbers on every CPU. vLLM 0.32 has kernels for CPUs
with AMX only: they leave activations in bf16, and those for experts fail where a rank holds some of the experts. Other CPUs are refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megafork.compat.vllm import wrap_once

_GROUP = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def install() -> None:
    """Put the kernels before vLLM's own for CPUs. Call before creating a model; further calls change nothing."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization import fp8
    from vllm.platforms import PlatformEnum

    kernels: list[Any] = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if not any(kernel.__name__ == "ReferenceBlockKernel" for kernel in kernels):
        kernels.insert(0, _kernel(linear.Fp8BlockScaledMMLinearKernel))
    wrap_once(fp8, "select_fp8_moe_backend", _with_reference)


def _kernel(base: Any) -> type:
    class ReferenceBlockKernel(base):
        """Quantises activations by 1 x 128, as the base class does, and multiplies in fp32."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            """A [tokens, K] e4m3 with As [tokens, K / 128]; B [N, K] e4m3 with Bs [N / 128, K / 128]; returns [tokens, N] fp32."""
            inputs = A.float() * As.repeat_interleave(self.weight_group_shape[1], 1)[:, : A.size(1)]
            return inputs @ _wide(B, Bs, self.weight_group_shape).T

    return ReferenceBlockKernel


def _with_reference(original: Any) -> Any:
    """Chooses the reference for experts in blocks of 128 x 128 on a CPU."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Static128BlockSym
    from vllm.platforms import current_platform

    reference = _experts(CPUUnquantizedExperts)

    def select(config: Any, weight_key: Any, activation_key: Any, **kwargs: Any) -> tuple[Any, Any]:
        if current_platform.is_cpu() and weight_key == kFp8Static128BlockSym and config.activation == MoEActivation.SILU:
            return Fp8MoeBackend.EMULATION, reference  # of all backends, it changes nothing about the weights
        return original(config, weight_key, activation_key, **kwargs)

    return select


def _experts(base: Any) -> type:
    class ReferenceBlockExperts(base):
        """Quantises the inputs of both projections by 1 x 128 and multiplies in fp32, one expert after the other."""

        def apply(
            self,
            *,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            expert_map: Tensor | None,
            apply_router_weight_on_input: bool,
            **unused: Any,
        ) -> None:
            """hidden_states and output [tokens, hidden]; w1 [experts, 2 x intermediate, hidden] and w2 [experts, hidden, intermediate],
            e4m3; topk_weights and topk_ids [tokens, k]. Experts of other ranks add nothing."""
            assert not apply_router_weight_on_input
            here = topk_ids.long() if expert_map is None else expert_map.long()[topk_ids.long()]  # -1: on another rank
            block, inputs, total = self.block_shape, _rounded(hidden_states), torch.zeros_like(output, dtype=torch.float32)
            for expert in here.unique().tolist():
                if expert >= 0:
                    tokens, place = (here == expert).nonzero(as_tuple=True)
                    gate, up = (inputs[tokens] @ _wide(w1[expert], self.w1_scale[expert], block).T).to(output.dtype).float().chunk(2, -1)
                    inner = _rounded((F.silu(gate) * up).to(output.dtype))
                    outer = inner @ _wide(w2[expert], self.w2_scale[expert], block).T
                    total.index_add_(0, tokens, outer * topk_weights[tokens, place].float()[:, None])
            output.copy_(total)

    return ReferenceBlockExperts


def _wide(weight: Tensor, scale: Tensor, block: Any) -> Tensor:
    """The fp32 weight [N, K] of e4m3 [N, K] and its scales, one for each block."""
    rows, columns = block
    return weight.float() * scale.repeat_interleave(rows, 0)[: weight.size(0)].repeat_interleave(columns, 1)[:, : weight.size(1)]


def _rounded(inputs: Tensor) -> Tensor:
    """Inputs [tokens, K] as they are after quantisation in groups of 1 x 128, fp32."""
    groups = inputs.float().unflatten(-1, (-1, _GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=1e-10)
    return ((groups / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
