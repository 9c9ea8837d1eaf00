"""Reinforcement learning: the step, and the run around it. One program, the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.data.reward import Verifiers
from megafork.parallel.mesh import Mesh
from megafork.parallel.quantile import Threshold, percentiles
from megafork.parallel.reduce import from_last_stage, over_tokens, over_world
from megafork.recipe import Loss, Recipe
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import set_weights, token_loss
from megafork.rl.packing import padding_multiple, plan
from megafork.rollout.colocated import ColocatedEngine
from megafork.train.clock import Clock
from megafork.train.exchange import exchange
from megafork.train.record import write_rollouts
from megafork.train.run import (
    Inputs,
    Metrics,
    build_learner,
    export_hf,
    log_metrics,
    open_log,
    packer,
    read_inputs,
    resume,
    save_checkpoint,
)
from megafork.train.sampler import Collected, Outcome, Sampler, evaluate
from megafork.weights.policy_weights import export_policy


class Trainer:
    """A run's parts, and its step. Every rank makes one and calls each method together."""

    def __init__(self, recipe: Recipe, mesh: Mesh, inputs: Inputs) -> None:
        self.recipe = recipe
        self.mesh = mesh
        self.inputs = inputs
        self.groups = ForkGroups(mesh.token_group, mesh.cp_group)
        self.learner = build_learner(
            inputs, recipe, mesh, updates=recipe.train.steps * recipe.train.minibatches, temperature=recipe.rollout.temperature
        )
        self.engine = ColocatedEngine(recipe, mesh)
        self.verifiers = Verifiers(recipe.reward) if self.engine.rank == 0 else None
        self.sampler = Sampler(recipe, inputs.train, self.engine, self.verifiers, inputs.tokenizer, mesh)
        self.reward_error: str | None = None
        """Why a response could not be judged, for the first that could not; every rank knows it."""

    def step(self, step: int) -> Metrics:
        """Roll out, reward, score, select forks, update, refit. Returns the step's metrics, the same on every rank."""
        clock = Clock()
        with clock("rollout"):
            collected = self.sampler.collect(step)
            self.engine.sleep()
        minibatches = self.place(collected)
        everything = [micro for mini in minibatches for micro in mini]
        thresholds: list[Threshold] = []
        updates: list[dict[str, float]] = []
        if everything:
            with clock("score"):
                self.learner.score(everything)
                entropies = self.entropy_metrics(everything)
            with clock("update"):
                if self.recipe.forks.scope == "batch":
                    thresholds.append(self.select(everything, step))
                for mini in minibatches:
                    if self.recipe.forks.entropy_from == "current" and updates:
                        self.learner.score(mini, entropy_only=True)
                    if self.recipe.forks.scope != "batch":
                        thresholds.append(self.select(mini, step))
                    if self.mesh.is_last_stage:
                        set_weights(mini, self.recipe.forks, self.recipe.loss, self.groups)
                    updates.append(self.learner.train(mini, partial(policy_loss, loss=self.recipe.loss)))
        with clock("refit"):
            self.engine.wake()
            self.refit(step)
        if everything and self.recipe.log.rollouts_every and step % self.recipe.log.rollouts_every == 0:
            write_rollouts(self.recipe.run_folder / "rollouts" / f"step_{step:06d}.parquet", step, everything, self.inputs, self.mesh)
        metrics = self.sample_metrics(collected, everything)
        if everything:
            metrics |= entropies | self.update_metrics(everything, thresholds, updates)
        clock.times["reward"] = over_world([collected.reward_seconds], self.mesh, "max")[0]
        return metrics | clock.metrics(collected.sampled_tokens, self.mesh)

    def place(self, collected: Collected) -> list[list[MicroBatch]]:
        """Send each response to the ranks that train on it; this rank's packed micro-batches of each mini-batch that has any."""
        multiple = padding_multiple(self.mesh.layout)
        plans: list[list[list[Outcome]]] = []
        dp_rank_of: dict[tuple[int, int], int] = {}
        for groups in _split(collected.groups, self.recipe.train.minibatches):
            outcomes = [outcome for outcome in collected.outcomes if outcome.group in groups]
            placed = plan([o.prompt_tokens + o.tokens - 1 for o in outcomes], self.mesh.dp, self.recipe.micro_batch_tokens, multiple)
            for rank, micros in enumerate(placed):
                dp_rank_of |= {(outcomes[n].group, outcomes[n].sample): rank for n in itertools.chain(*micros)}
            plans.append([[outcomes[n] for n in members] for members in placed[self.mesh.dp_rank]])
        mine = {(r.group, r.sample): r for r in exchange(collected.responses, collected.outcomes, dp_rank_of, self.mesh)}
        packed = packer(self.mesh)
        return [[packed([mine[o.group, o.sample] for o in members]) for members in micros] for micros in plans]

    def select(self, micros: list[MicroBatch], step: int) -> Threshold:
        """Set the masks; the threshold is known to every rank."""
        found = (
            select_forks(micros, self.recipe.forks, self.groups, seed=self.recipe.run.seed, step=step) if self.mesh.is_last_stage else None
        )
        return from_last_stage(found, self.mesh)

    def refit(self, version: int) -> None:
        self.engine.refit(export_policy(self.learner.chunks, self.inputs.shape, self.mesh), version)

    def entropy_metrics(self, micros: list[MicroBatch]) -> Metrics:
        """Entropy of the step's response tokens and the engine's log-probs against the trainer's, before any update."""
        shares: dict[str, float] = {}
        sums: dict[str, Tensor | float] = {}
        worst: dict[str, Tensor | float] = {}
        if self.mesh.is_last_stage:
            entropy = torch.cat([micro.entropy for micro in micros])
            delta = torch.cat([micro.old_log_prob - micro.rollout_log_prob for micro in micros]).double()
            levels = percentiles([micro.entropy for micro in micros], (0.5, 0.8, 0.95), group=self.groups.tokens)
            shares = dict(zip(("entropy/p50", "entropy/p80", "entropy/p95"), levels, strict=True))
            sums = {
                "tokens": entropy.numel(),
                "entropy": entropy.double().sum(),
                "low": (entropy < 0.05).sum(),
                "kl": (delta.exp() - 1 - delta).sum(),
            }
            worst = {"delta": delta.abs().max() if delta.numel() else 0.0}
        total = over_tokens(sums, self.mesh)
        return {
            **from_last_stage(shares, self.mesh),
            "entropy/mean": total["entropy"] / total["tokens"],
            "entropy/share_below_0.05": total["low"] / total["tokens"],
            "rollout_mismatch/kl": total["kl"] / total["tokens"],
            "rollout_mismatch/max": over_tokens(worst, self.mesh, "max")["delta"],
        }

    def update_metrics(self, micros: list[MicroBatch], thresholds: list[Threshold], updates: list[dict[str, float]]) -> Metrics:
        sums: dict[str, Tensor | float] = {}
        if self.mesh.is_last_stage:
            sums = {"entropy": sum(float(micro.entropy[micro.mask].double().sum()) for micro in micros)}
        selected = sum(threshold.selected for threshold in thresholds)
        forks = max(selected, 1)
        return {
            "entropy/forks": over_tokens(sums, self.mesh)["entropy"] / forks,
            "forks/tau": sum(threshold.tau for threshold in thresholds) / len(thresholds),
            "forks/fraction": selected / max(sum(threshold.total for threshold in thresholds), 1),
            "forks/ties": sum(threshold.ties for threshold in thresholds),
            "loss/policy": sum(update["loss"] for update in updates) / len(updates),
            "loss/clip_fraction": sum(update["clipped"] for update in updates) / forks,
            "loss/approx_kl": sum(update["kl"] for update in updates) / forks,
            "grad_norm": sum(update["grad_norm"] for update in updates) / len(updates),
            "lr": updates[-1]["lr"],
        }

    def sample_metrics(self, collected: Collected, micros: list[MicroBatch]) -> Metrics:
        outcomes = collected.outcomes
        errors, padding, tokens = over_world(
            [collected.errors, sum(m.padding for m in micros), sum(sum(m.lengths) for m in micros)], self.mesh
        )
        if errors and self.reward_error is None:
            first: list[str | None] = [None] * self.mesh.world
            dist.all_gather_object(first, collected.first_error)
            self.reward_error = next(error for error in first if error)
        kept = max(len(outcomes), 1)
        return {
            "accuracy/mean": collected.sampled_accuracy,
            "reward/mean": sum(outcome.reward for outcome in outcomes) / kept,
            "reward/errors": errors,
            "response_length/mean": sum(outcome.tokens for outcome in outcomes) / kept,
            "response_length/truncated": sum(outcome.truncated for outcome in outcomes) / kept,
            "sampling/refills": collected.refills,
            "sampling/groups": len(collected.groups),
            "packing/padding": padding / max(tokens, 1),
        }

    def evaluate(self) -> Metrics:
        """Accuracy on the held-out prompts, or nothing without any."""
        if not self.inputs.held_out:
            return {}
        return dict(evaluate(self.inputs.held_out, self.engine, self.verifiers, self.inputs.tokenizer, self.recipe, self.mesh))

    def close(self) -> None:
        if self.verifiers is not None:
            self.verifiers.close()
        self.engine.close()


def policy_loss(log_prob: Tensor, micro: MicroBatch, *, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_loss` at the micro-batch's forks, with the sums that the log shows."""
    old, advantage = micro.old_log_prob[micro.mask], micro.advantage[micro.mask]
    value, clipped = token_loss(log_prob, old, advantage, loss)
    with torch.no_grad():
        log_ratio = (log_prob - old).double()
        return value, {"clipped": clipped.sum(), "kl": (log_ratio.exp() - 1 - log_ratio).sum()}


def train(recipe: Recipe, mesh: Mesh) -> Metrics:
    """A whole run, or what is left of it. Every rank calls. Returns the last step's metrics with the accuracies before and after."""
    inputs = read_inputs(recipe, supervised=False)
    trainer = Trainer(recipe, mesh, inputs)
    state = resume(trainer.learner, recipe, inputs)
    start = 0
    if state is not None:
        start = state["step"]
        trainer.sampler.order.restore(state["order"])
        torch.set_rng_state(state["rng"])
    trainer.refit(start)
    steps, every = recipe.train.steps, recipe.checkpoint.every
    log = open_log(recipe, mesh, start)
    if start == 0:
        log_metrics(log, {"step": 0, **trainer.evaluate()})
    last: Metrics = {}
    for step in range(start + 1, steps + 1):
        told = trainer.reward_error
        last = {"step": step, **trainer.step(step)}
        if step == steps or (recipe.eval.every and step % recipe.eval.every == 0):
            last |= trainer.evaluate()
        log_metrics(log, last)  # before the checkpoint: a run killed in between repeats the step and its line
        if log is not None:
            for remark in _remarks(last, first=step == start + 1, error=trainer.reward_error if trainer.reward_error != told else None):
                log.note(remark)
        if step == steps or (every and step % every == 0):
            save_checkpoint(step, trainer.learner, recipe, inputs, {"order": trainer.sampler.order.state(), "rng": torch.get_rng_state()})
    if recipe.checkpoint.export_hf:
        export_hf(trainer.learner, inputs, recipe)
    trainer.close()
    if log is not None:
        log.close()
    return last


def _remarks(metrics: Metrics, *, first: bool, error: str | None) -> Iterator[str]:
    """What is worth a line on the screen besides the numbers."""
    if first and "entropy/p80" in metrics:
        low, p80 = metrics["entropy/share_below_0.05"], metrics["entropy/p80"]
        yield f"{low:.0%} of the tokens are under 0.05 nats, the 80th percentile is {p80:.2f}"
    if error is not None:
        yield f"{metrics['reward/errors']:.0f} responses could not be judged and count as wrong: {error}"


def _split(groups: list[int], parts: int) -> list[set[int]]:
    """Groups in order into `parts` mini-batches as even as possible; empty ones are left out."""
    bounds = [len(groups) * n // parts for n in range(parts + 1)]
    return [set(groups[low:high]) for low, high in itertools.pairwise(bounds) if high > low]
