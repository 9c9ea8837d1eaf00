"""Megatron's mixture-of-experts layers, for the models that have experts: every token goes to its experts, none is dropped.

In plain layers experts run one after the other (`SequentialMLP`), in fused ones together (`TEGroupedMLP`). The router is the same in both:
it computes in fp32, and what balances it, if anything, is the loss below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megafork.compat import experts as fixes
from megafork.model.attention import PackedSequences
from megafork.recipe import Parallel
from megafork.shape import Shape


def settings(shape: Shape, layout: Parallel, *, fused: bool) -> dict[str, Any]:
    """The experts' settings of Megatron's TransformerConfig, for fused or plain layers; none for a dense model."""
    if shape.moe is None:
        return {}
    fixes.run_without_transformer_engine()
    fixes.read_splits_on_host()
    fixes.gather_uneven_rows()
    fixes.wait_for_no_stream()
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
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


def _frequency(shape: Shape) -> int | list[int]:
    """Which layers have experts; 1: all of them, whose parameters a checkpoint then stacks as it does a dense model's."""
    sparse = [int(shape.is_sparse(layer)) for layer in range(shape.layers)]
    return sparse if 0 in sparse else 1


class Replay:
    """Takes the place of a router's choice of experts, or notes it. Scores, and with them weights and gradients, stay the router's own."""

    def __init__(self, routing: Tensor, *, note: bool) -> None:
        """routing: int16 [T, k], the experts of each token, -1 where the router chooses. `note`: write its choice there instead."""
        self.routing = routing
        self.note = note
        self.changed = routing.new_zeros(routing.shape, dtype=torch.bool)
        """bool [T, k]: experts that the router would not have chosen."""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Megatron's router asks this in place of `choose`: (scores of the chosen experts, their numbers), both [T, k], best first."""
        best, own = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.note:
            self.routing.copy_(own)
            return best, own
        given = torch.where(self.routing >= 0, self.routing.long(), own)
        self.changed = (given[:, :, None] != own[:, None, :]).all(-1)
        best, order = scores.gather(1, given).sort(descending=True, stable=True)
        return best, given.gather(1, order)


class Router(TopKRouter):
    """Megatron's router, which also counts tokens, can balance them, and can be given its choice. Padding is neither counted nor
    balanced."""

    packing: PackedSequences | None = None
    """The micro-batch whose tokens come next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        zeros = torch.zeros(self.num_experts + 2, dtype=torch.float64, device=torch.cuda.current_device())
        self.register_buffer("seen", zeros, persistent=False)
        """fp64 [experts + 2]: tokens of each expert since the buffer was last cleared, choices that a replay changed, and the balancing
        loss. Only forwards with gradient count, so each micro-batch does once, however its activations are recomputed."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits fp32 [T, 1, E] of this rank's tokens -> (weights of each token's experts, 0 elsewhere; chosen, bool), both [T, E]."""
        packing = self.packing
        self.router_replay = None
        if packing is not None and packing.routing is not None:
            self.router_replay = Replay(self._mine(packing.routing[:, self.layer_number - 1]), note=packing.note_routing)
        weights, chosen = super().routing(logits, padding_mask)
        if packing is None or packing.owner is None or not torch.is_grad_enabled():
            return weights, chosen
        owner = self._mine(packing.owner)
        self.seen[:-2] += (chosen & (owner >= 0)[:, None]).sum(0)
        if self.router_replay is not None:
            self.seen[-2] += (self.router_replay.changed & (owner >= 0)[:, None]).sum()
        if packing.balance:
            loss = packing.balance * self._imbalance(logits.flatten(0, 1), chosen, owner, len(packing.lengths))
            self.seen[-1] += loss.detach()
            weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, chosen

    def _mine(self, tokens: Tensor) -> Tensor:
        """What this rank's router sees of the tokens of all TP ranks."""
        return tokens.chunk(self.tp_group.size())[self.tp_group.rank()] if self.config.sequence_parallel else tokens

    def _imbalance(self, logits: Tensor, chosen: Tensor, owner: Tensor, sequences: int) -> Tensor:
        """This rank's part of the sum over sequences of E sum_e f_e P_e, where f_e is the share of the sequence's choices that fell on
        expert e, without gradient, and P_e its mean probability (arXiv 2412.19437, section 2.1.2). All ranks of TP x CP must call."""
        at = torch.where(owner >= 0, owner, sequences)  # one row more, for padding
        counts = torch.zeros(sequences + 1, self.num_experts, dtype=torch.float32, device=logits.device)
        counts.index_add_(0, at, chosen.float())
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        choices = counts.sum(1, keepdim=True).clamp(min=1)
        factor = counts * (self.num_experts * self.topk) / choices.square()  # f_e E / (tokens of the sequence)
        factor[-1] = 0.0
        return (factor[at] * logits.softmax(-1)).sum()


class SparseLayer(TransformerLayer):
    """A layer with experts, whose router is told which micro-batch it routes, also where activations are recomputed."""

    def forward(self, *args: Any, packed_seq_params: PackedSequences | None = None, **kwargs: Any) -> Any:
        self.mlp.router.packing = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def route(spec: ModuleSpec) -> None:
    """Give Megatron's spec of a layer with experts our layer and router."""
    spec.module = SparseLayer
    spec.submodules.mlp.submodules.router = Router


def routers(chunk: Any) -> dict[int, Router]:
    """The routers of a model chunk, by layer within the whole model."""
    return {layer.layer_number - 1: layer.mlp.router for layer in chunk.decoder.layers if isinstance(layer, SparseLayer)}
