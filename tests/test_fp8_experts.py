"""The kernel for experts in FP8 blocks on the CPU, against float64, and the experts of two ranks against those of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import on_ranks

from megafork.compat import vllm_fp8
from megafork.model.fp8 import dequantize, quantize

EXPERTS, CHOSEN, HIDDEN, INNER, TOKENS = 4, 2, 256, 384, 50


def _computed() -> list[Any]:
    """(Found, exact) outputs of all experts, and of a rank that holds the second and third only."""
    torch.manual_seed(0)
    from vllm.model_executor.layers.fused_moe import config as moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 16, torch.randn(EXPERTS, HIDDEN, INNER) / 16
    tokens = torch.randn(TOKENS, HIDDEN).bfloat16()
    ids = torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :CHOSEN].int()
    shares = torch.rand(TOKENS, CHOSEN)
    (w1, w1_scale), (w2, w2_scale) = ([torch.stack(part) for part in zip(*map(quantize, each), strict=True)] for each in (gate_up, down))

    sizes = (EXPERTS, CHOSEN, HIDDEN, INNER, EXPERTS, EXPERTS, MoEActivation.SILU, "cpu", moe.RoutingMethodType.Renormalize)
    config = moe.FusedMoEConfig(*sizes, moe.FusedMoEParallelConfig.make_no_parallel(), torch.bfloat16)

    def run(expert_map: torch.Tensor | None, here: slice) -> torch.Tensor:
        quantised = moe.fp8_w8a8_moe_quant_config(w1_scale=w1_scale[here], w2_scale=w2_scale[here], block_shape=[128, 128])
        experts = vllm_fp8._experts(CPUUnquantizedExperts)(config, quantised)
        output = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16)
        weights = {"w1": w1[here], "w2": w2[here], "topk_weights": shares, "topk_ids": ids, "expert_map": expert_map}
        experts.apply(output=output, hidden_states=tokens, apply_router_weight_on_input=False, **weights)
        return output.double()

    exact = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    of_two = exact.clone()
    for expert in range(EXPERTS):
        first, second = (dequantize(w[expert], s[expert]).double() for w, s in ((w1, w1_scale), (w2, w2_scale)))
        gate, up = (_rounded(tokens.double()) @ first.T).bfloat16().double().chunk(2, -1)
        inner = (gate / (1 + (-gate).exp()) * up).bfloat16().double()
        made = (shares * (ids == expert)).sum(-1, keepdim=True) * (_rounded(inner) @ second.T)
        exact += made
        of_two += made if expert in (1, 2) else 0
    own = torch.tensor([-1, 0, 1, -1])
    return [(run(None, slice(None)), exact), (run(own, slice(1, 3)), of_two)]


def _rounded(inputs: torch.Tensor) -> torch.Tensor:
    groups = inputs.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scale).float().to(torch.float8_e4m3fn).double() * scale).flatten(-2)


@pytest.mark.slow
def test_it_computes_what_the_blocks_and_the_groups_of_inputs_say() -> None:
    """Between the projections numbers are bf16, as on a GPU: without that, those near the middle of two FP8 numbers would differ."""
    [results] = on_ranks(1, _computed, engines=True)
    for found, exact in results:
        assert float((found - exact).norm() / exact.norm()) < 0.004
