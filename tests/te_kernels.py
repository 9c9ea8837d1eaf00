"""Plays Transformer Engine's kernels on the CPU, by torch's operators: what fused layers compute, and Megatron's code around them.

Only the kernels are replaced. Modules, their parameters, and all that Megatron and megafork do with them are real.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def play() -> None:
    """Until this process ends. Products are not in FP8; rows are padded for it."""
    _play_modules()
    _play_sorting()
    _play_padding()
    _play_optimizer()


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def _column(self: Any, hidden: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

    if self.parallel_mode == "column" and self.tp_size > 1:
        spread = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        hidden = spread(hidden, group=self.tp_group)
    return F.linear(hidden, self.weight)


def _row(self: Any, hidden: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, reduce_scatter_to_sequence_parallel_region

    out = F.linear(hidden, self.weight)
    if self.tp_size == 1:
        return out
    add = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region
    return add(out, group=self.tp_group)


def _linear(self: Any, hidden: Tensor, **unused: Any) -> Tensor:
    return _row(self, hidden) if self.parallel_mode == "row" else _column(self, hidden)


def _norm_and_linear(self: Any, hidden: Tensor, **unused: Any) -> Tensor:
    return _column(self, _norm(hidden, self.layer_norm_weight, self.eps))


def _grouped(self: Any, tokens: Tensor, rows: list[int], **unused: Any) -> Tensor:
    weights = (getattr(self, f"weight{n}") for n in range(self.num_gemms))
    return torch.cat([F.linear(part, weight) for part, weight in zip(tokens.split(rows), weights, strict=True)])


def _attention(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **how: Any) -> Tensor:
    """Of packed sequences [T, heads, d] -> [T, heads x d]."""
    assert how["qkv_format"] == "thd" and how["attn_mask_type"] == "padding_causal" and self.cp_group is None
    lengths = how["cu_seqlens_q"].diff().tolist()
    done = []
    for q, k, v in zip(*(part.transpose(0, 1).split(lengths, 1) for part in (query, key, value)), strict=True):
        scale = self.fused_attention.softmax_scale
        done.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(done, 1).transpose(0, 1).flatten(1)


def _swiglu(self: Any, gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up


def _rotary(tensor: Tensor, cu_seqlens: Tensor, angles: Tensor, **cp: int) -> Tensor:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    return apply_rotary_pos_emb(tensor, angles, tensor_format="thd", cu_seqlens=cu_seqlens, **cp)


def _play_modules() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from transformer_engine import pytorch as te

    te.Linear.forward = _linear
    te.LayerNormLinear.forward = _norm_and_linear
    te.GroupedLinear.forward = _grouped
    te.RMSNorm.forward = lambda self, hidden: _norm(hidden, self.weight, self.eps)
    te.DotProductAttention.forward = _attention
    te.ops.SwiGLU.forward = _swiglu
    rope_utils.fused_apply_rotary_pos_emb_thd = _rotary


def _play_sorting() -> None:
    """By Megatron's own functions for plain layers."""
    from megatron.core.transformer.moe import moe_utils

    permute, unpermute, sort = moe_utils.permute, moe_utils.unpermute, moe_utils.sort_chunks_by_idxs
    moe_utils.fused_permute_with_probs = lambda tokens, probs, chosen, num_out_tokens: permute(tokens, chosen, probs, num_out_tokens)
    moe_utils.fused_unpermute = lambda tokens, places, merging_probs, restore_shape: unpermute(tokens, places, restore_shape)
    moe_utils.fused_sort_chunks_by_index = lambda tokens, sizes, order: sort(tokens, sizes, order)[0]
    moe_utils.fused_sort_chunks_by_index_with_probs = lambda tokens, probs, sizes, order: sort(tokens, sizes, order, probs)


def _play_padding() -> None:
    """By the recipe that layers in FP8 train with."""
    from transformer_engine.common.recipe import Float8BlockScaling
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    def pad(rows: Tensor, padded: Tensor, counts: list[int], more: list[int]) -> None:
        padded.zero_()
        for part, whole in zip(rows.split(counts), padded.split(more), strict=True):
            whole[: len(part)].copy_(part)

    def unpad(padded: Tensor, rows: Tensor, more: list[int], counts: list[int]) -> None:
        for part, whole in zip(rows.split(counts), padded.split(more), strict=True):
            part.copy_(whole[: len(part)])

    kernels: Any = importlib.import_module("transformer_engine_torch")
    kernels.fused_multi_row_padding, kernels.fused_multi_row_unpadding = pad, unpad
    FP8GlobalStateManager.FP8_RECIPE = Float8BlockScaling()


@torch.no_grad()
def _adam(self: Any) -> None:
    for group in self.param_groups:
        group["step"] = group.get("step", 0) + 1
        (low, high), step = group["betas"], group["step"]
        for parameter in group["params"]:
            state = self.state[parameter]
            gradient = parameter.grad if parameter.grad is not None else parameter.decoupled_grad
            state["exp_avg"].lerp_(gradient, 1 - low)
            state["exp_avg_sq"].lerp_(gradient.square(), 1 - high)
            root = (state["exp_avg_sq"] / (1 - high**step)).sqrt_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(group["lr"] / (1 - low**step) * state["exp_avg"] / (root + group["eps"]))


def _play_optimizer() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads
    from transformer_engine.pytorch.optimizers import FusedAdam

    FusedAdam.step = _adam
    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale
