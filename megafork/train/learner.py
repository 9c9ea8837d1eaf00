"""Forward and backward over packed micro-batches, and the optimizer: the same for reinforcement learning and supervised training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from torch import Tensor

from megafork.compat import megatron as megatron_fixes
from megafork.model.kernels import accumulate_in_main_gradients
from megafork.model.policy import Policy
from megafork.model.schedule import run_micro_batches
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_tokens, over_world
from megafork.recipe import Optimizer, Recipe
from megafork.rl.batch import MicroBatch
from megafork.rl.fork_temperature import fork_temperature
from megafork.train.experts import expert_metrics
from megafork.train.reference import Reference

TokenLoss = Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""(log_prob [P'] at the selected positions, micro-batch) -> (loss of each, sums to report). P' is the number of selected positions."""


class Learner:
    """The policy in Megatron's DDP, and its distributed optimizer. Every rank creates one, and all ranks call each method together."""

    def __init__(self, chunks: list[Policy], recipe: Recipe, mesh: Mesh, *, updates: int) -> None:
        """`chunks` must already hold their weights. `updates`: optimizer updates in the whole run, for the learning-rate decay."""
        self.chunks = chunks
        self.recipe = recipe
        self.mesh = mesh
        self.updates = updates
        self.update = 0
        """Optimizer updates done, including skipped ones."""
        self.skips_in_a_row = 0
        """Consecutive updates up to the latest that were skipped because a gradient was not finite."""
        self.reference = Reference(chunks) if recipe.loss.kl.kept else None
        """The weights at the start of the run, whether or not it is resumed."""
        self.model = _data_parallel(chunks, overlap=recipe.optimizer.overlap)
        for chunk in chunks:
            accumulate_in_main_gradients(chunk)
        adam = _optimizer_config(recipe)
        self.optimizer = get_megatron_optimizer(
            adam,
            self.model,
            config_overrides=get_standard_config_overrides(adam),  # no weight decay on norms and biases
            use_gloo_process_groups=mesh.device.type == "cuda",
        )
        megatron_fixes.fix_optimizer_state(self.optimizer)
        megatron_fixes.keep_norms_on_device()
        megatron_fixes.exchange_shapes_on_host()

    def score(self, micros: list[MicroBatch], *, entropy_only: bool = False) -> None:
        """Set `entropy` and, unless `entropy_only`, `old_log_prob` at every response position, without gradient (last stage only). Under
        fork-aware decoding also set the `temperature` at which each token was drawn, and where the scoring pass is the source of
        `rollout.routing`, the routing (every rank its own part)."""
        forks = None if entropy_only else fork_temperature(self.recipe.rollout)
        note = self.recipe.routing_from == "score" and all(micro.routing is None for micro in micros)
        if note:
            for micro in micros:
                micro.routing = self._unrouted(micro)

        def keep(micro: MicroBatch, output: tuple[Tensor, Tensor], non_loss_data: bool) -> None:
            log_prob, micro.entropy = output
            if not entropy_only:
                micro.old_log_prob = log_prob
                if forks:
                    micro.temperature = forks.of(micro.entropy)

        with torch.no_grad():
            routing = "note" if note else "replay"
            self._run(micros, keep, temperature_of=forks.of if forks else None, forward_only=True, everywhere=True, routing=routing)

    def _unrouted(self, micro: MicroBatch) -> Tensor:
        config: Any = self.chunks[0].config
        shape = (micro.tokens.size(1), config.num_layers, config.moe_router_topk)
        return torch.full(shape, -1, dtype=torch.int16, device=self.mesh.device)

    def score_reference(self, micros: list[MicroBatch]) -> None:
        """Set `reference_log_prob` at every response position, without gradient (last stage only).

        The weights at the start of the run take the place of the policy's meanwhile."""
        assert self.reference is not None, "loss.kl asks for no reference"

        def keep(micro: MicroBatch, output: tuple[Tensor, Tensor], non_loss_data: bool) -> None:
            micro.reference_log_prob = output[0]

        self.settle()
        with self.reference.in_place(), torch.no_grad():
            self._run(micros, keep, forward_only=True, everywhere=True, routing="own")

    def train(self, micros: list[MicroBatch], token_loss: TokenLoss, *, entropy_bonus: float = 0.0) -> dict[str, float]:
        """One optimizer update from a mini-batch. `mask` and `weight` of every micro-batch must be set on the last stage.

        The loss is sum(weight * (token_loss - entropy_bonus * entropy)) over the mini-batch's selected positions on all ranks; gradients
        are its exact sum.
        Unless gradients are finite everywhere, every rank skips the update. Returns `loss`, `grad_norm`, `lr`, `skipped` (0 or 1) and the
        sums reported by `token_loss`, the same on every rank.
        """
        sums: dict[str, Tensor] = {}

        def loss(micro: MicroBatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            value, report = token_loss(output[0], micro)
            if entropy_bonus:
                value = value - entropy_bonus * output[1]
            total = (micro.weight[micro.selected] * value).sum()
            for name, part in {"loss": total, **report}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=part.device)) + part.detach().double()
            return total, torch.zeros([], dtype=torch.int), {}

        self._balance(micros)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(micros, loss, forward_only=False, everywhere=False, entropy_grad=entropy_bonus > 0)
        rate = learning_rate(self.update, self.updates, self.recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group["wd_mult"]
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())  # over all ranks, so they agree
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            self.optimizer.step()
        self.update += 1
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        return {**over_tokens(sums, self.mesh), "grad_norm": grad_norm, "lr": rate, "skipped": float(skipped)}

    def _balance(self, micros: list[MicroBatch]) -> None:
        """Weight every response's part of the loss that balances experts: their mean, over the mini-batch of all ranks."""
        if coefficient := self.recipe.loss.expert_balance:
            copies = over_world([sum(len(micro.responses) for micro in micros)], self.mesh)[0]
            for micro in micros:
                micro.balance = coefficient * self.mesh.layout.model_size / max(copies, 1)

    def expert_metrics(self) -> dict[str, float]:
        """Metrics of the routers since the last call, {} for a dense model. Every rank must call."""
        return expert_metrics(self.chunks, self.mesh)

    def settle(self) -> None:
        """Make every rank's weights current. Needed before anything but a forward reads them: with overlap, they are only gathered by
        the next forward."""
        if self.recipe.optimizer.overlap:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _run(self, micros: list[MicroBatch], loss: Callable[..., Any], **how: Any) -> None:
        run_micro_batches(self.model, micros, loss, cp=self.mesh.layout.cp, **how)


def _data_parallel(chunks: list[Policy], *, overlap: bool) -> list[DistributedDataParallel]:
    config = chunks[0].config
    config.finalize_model_grads_func = _finalize_without_scaling
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        average_in_collective=False,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    model = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)]
    if overlap:  # gradients are reduced with the last micro-batch's backward
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    return model


def _finalize_without_scaling(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Finalize gradients without dividing by Megatron's own token count: the loss already has its global denominator."""
    finalize_model_grads(model, None, **kwargs)


def _optimizer_config(recipe: Recipe) -> OptimizerConfig:
    spec = recipe.optimizer
    bf16 = recipe.precision.dtype == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=spec.lr,
        min_lr=spec.min_lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.betas[0],
        adam_beta2=spec.betas[1],
        adam_eps=spec.eps,
        clip_grad=spec.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=spec.overlap,
    )


def learning_rate(update: int, updates: int, spec: Optimizer) -> float:
    """Learning rate of optimizer update number `update` (from 0): linear warm-up from above 0, then decay to `min_lr`."""
    if update < spec.warmup_steps:
        return spec.lr * (update + 1) / spec.warmup_steps
    if spec.decay == "constant":
        return spec.lr
    done = (update - spec.warmup_steps) / max(updates - 1 - spec.warmup_steps, 1)
    left = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0))) if spec.decay == "cosine" else 1.0 - min(done, 1.0)
    return spec.min_lr + (spec.lr - spec.min_lr) * left
