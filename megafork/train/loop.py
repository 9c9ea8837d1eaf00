"""Reinforcement learning: the step, and the run around it. One program, the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.analysis.run_folder import is_evaluated
from megafork.data.reward import Verifiers
from megafork.model.fp8 import Quantized
from megafork.parallel.mesh import Mesh
from megafork.parallel.quantile import Threshold
from megafork.parallel.reduce import from_last_stage, over_world
from megafork.recipe import Loss, Recipe
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import importance, set_weights, token_loss
from megafork.rl.packing import packer, placement
from megafork.rollout.colocated import ColocatedEngine
from megafork.rollout.server import ServerEngine
from megafork.rollout.temperature import fork_temperature
from megafork.train.ahead import Ahead
from megafork.train.clock import Clock
from megafork.train.exchange import exchange
from megafork.train.inputs import Inputs
from megafork.train.parking import Parking
from megafork.train.record import write_evaluation, write_rollouts
from megafork.train.run import Metrics, Run, build_learner
from megafork.train.sampler import Collected, Outcome, Sampler
from megafork.train.summary import entropy_metrics, staleness, update_metrics
from megafork.train.update import Learner
from megafork.weights.bridge import Bridge
from megafork.weights.policy_weights import WholeWeights


class Trainer:
    """A run's parts, and its step. Every rank makes one and calls each method together."""

    def __init__(self, recipe: Recipe, mesh: Mesh, inputs: Inputs, learner: Learner) -> None:
        """`learner`: as the last step left it."""
        self.recipe = recipe
        self.mesh = mesh
        self.inputs = inputs
        self.learner = learner
        self.groups = ForkGroups(mesh.token_group, mesh.cp_group)
        self.parking = Parking(learner.model, learner.optimizer, mesh.device)
        if recipe.rollout.park_training:
            self.parking.park()  # vLLM takes its memory when it is made
        self.engine: ServerEngine | ColocatedEngine
        self.weights: WholeWeights | Bridge
        """What a refit hands over."""
        if recipe.rollout.servers:
            self.engine, self.weights = ServerEngine(recipe, mesh), WholeWeights(self.learner.chunks, inputs.shape, mesh)
        else:
            self.engine = ColocatedEngine(recipe, mesh, fork_decoding=recipe.rollout.fork_temperature is not None)
            self.weights = Bridge(self.learner.chunks, inputs.shape, mesh, recipe.rollout.tp)
        self.verifiers = Verifiers(recipe.reward) if self.engine.rank == 0 else None
        self.sampler = Sampler(recipe, inputs.train, self.engine, self.verifiers, inputs.tokenizer, mesh)
        self.ahead = Ahead(self.sampler)
        self.order = self.sampler.order.state()
        """Where the prompts' order stood after the last step's responses; a checkpoint keeps it."""
        self.reward_error: str | None = None
        """Why a response could not be judged, for the first that could not; every rank knows it."""

    def step(self, step: int) -> Metrics:
        """Roll out, reward, score, select forks, update, refit. Returns the step's metrics, the same on every rank."""
        clock = Clock()
        with clock("rollout"):
            collected = self.ahead.collect(step)
            self.order = collected.order
            self.engine.sleep()
            self.parking.unpark()
        minibatches = self.place(collected)
        everything = [micro for mini in minibatches for micro in mini]
        thresholds: list[Threshold] = []
        updates: list[dict[str, float]] = []
        if everything:
            with clock("score"):
                self.learner.score(everything)
                entropies = entropy_metrics(everything, self.groups, self.mesh)
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
            if self.recipe.rollout.park_training:
                self.parking.park()
            self.engine.wake()
            self.refit(step)
        if everything and self.recipe.log.rollouts_every and step % self.recipe.log.rollouts_every == 0:
            write_rollouts(self.recipe.run_folder / "rollouts" / f"step_{step:06d}.parquet", step, everything, self.inputs, self.mesh)
        metrics = self.sample_metrics(collected, everything) | staleness(collected.responses, step, self.mesh)
        if everything:
            metrics |= entropies | update_metrics(everything, thresholds, updates, self.mesh)
        metrics |= self.refit_metrics()
        clock.times["reward"] = over_world([collected.reward_seconds], self.mesh, "max")[0]
        return metrics | clock.metrics(collected.sampled_tokens, self.mesh)

    def place(self, collected: Collected) -> list[list[MicroBatch]]:
        """Send each response to the ranks that train on it; this rank's packed micro-batches of each mini-batch that has any."""
        plans: list[list[list[Outcome]]] = []
        dp_rank_of: dict[tuple[int, int], int] = {}
        for groups in _split(collected.groups, self.recipe.train.minibatches):
            outcomes = [outcome for outcome in collected.outcomes if outcome.group in groups]
            placed = placement([o.prompt_tokens + o.tokens - 1 for o in outcomes], self.recipe, self.mesh)
            for rank, micros in enumerate(placed):
                dp_rank_of |= {(outcomes[n].group, outcomes[n].sample): rank for n in itertools.chain(*micros)}
            plans.append([[outcomes[n] for n in members] for members in placed[self.mesh.dp_rank]])
        mine = {(r.group, r.sample): r for r in exchange(collected.responses, collected.outcomes, dp_rank_of, self.mesh)}
        packed = packer(self.recipe, self.mesh)
        return [[packed([mine[o.group, o.sample] for o in members]) for members in micros] for micros in plans]

    def select(self, micros: list[MicroBatch], step: int) -> Threshold:
        """Set the masks; the threshold is known to every rank."""
        found = (
            select_forks(micros, self.recipe.forks, self.groups, seed=self.recipe.run.seed, step=step) if self.mesh.is_last_stage else None
        )
        return from_last_stage(found, self.mesh)

    def refit(self, version: int) -> None:
        """Hand the current weights to the engines. Returns with every rank's engine at `version`."""
        self.learner.settle()
        self.engine.refit(Quantized(self.weights) if self.recipe.precision.rollout_fp8 else self.weights, version)
        dist.barrier()  # no rank asks a neighbour's engine for tokens of new weights before it has them

    def refit_metrics(self) -> Metrics:
        """Largest over the ranks: bytes received from other ranks and the most held for a layer; or bytes sent to servers, and how many
        of these have the weights."""
        if isinstance(self.weights, Bridge):
            received, buffer = over_world([self.weights.received, self.weights.buffer], self.mesh, "max")
            return {"refit/received_mb": received / 1e6, "refit/buffer_mb": buffer / 1e6}
        assert isinstance(self.engine, ServerEngine)
        sent, serving = over_world([self.engine.bytes_sent, self.engine.serving], self.mesh, "max")
        return {"refit/sent_mb": sent / 1e6, "refit/servers": serving}

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

    def evaluate(self, step: int) -> Metrics:
        """Accuracy on the held-out prompts, or nothing without any. Rank 0 writes down each prompt's, after `step`."""
        if not self.inputs.held_out:
            return {}
        found = self.ahead.evaluate(self.inputs.held_out)
        if self.mesh.is_rank_zero:
            write_evaluation(self.recipe.run_folder, step, found.accuracies)
        return dict(found.metrics)

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
        report = {"clipped": clipped.sum(), "kl": (log_ratio.exp() - 1 - log_ratio).sum()}
        if loss.importance_cap is None:
            return value, report
        ratio = importance(old, micro.rollout_log_prob[micro.mask], loss.importance_cap)
    return value * ratio, {**report, "importance": ratio.sum(), "capped": (ratio >= loss.importance_cap).sum()}


def train(recipe: Recipe, mesh: Mesh, inputs: Inputs) -> Metrics:
    """A whole run, or what is left of it. Every rank calls. Returns the last step's metrics with the accuracies before and after."""
    updates = recipe.train.steps * recipe.train.minibatches
    forks = fork_temperature(recipe.rollout)
    learner = build_learner(inputs, recipe, mesh, updates=updates, temperature=recipe.rollout.temperature, forks=forks)
    run = Run(recipe, mesh, inputs, learner)
    trainer = Trainer(recipe, mesh, inputs, learner)
    run.begin()
    if run.state is not None:
        trainer.sampler.order.restore(run.state["order"])
        torch.set_rng_state(run.state["rng"])
    trainer.refit(run.start)
    if run.start == 0:
        run.log({"step": 0, **trainer.evaluate(0)})
    if run.start == recipe.train.steps and not is_evaluated(recipe, run.start):  # of a run that lost it
        run.amend(trainer.evaluate(run.start))
    last: Metrics = {}
    for step in run.steps:
        told = trainer.reward_error
        last = {"step": step, **trainer.step(step)}
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            last |= trainer.evaluate(step)
        remarks = _remarks(last, first=step == run.start + 1, error=trainer.reward_error if trainer.reward_error != told else None)
        run.end_step(last, {"order": trainer.order, "rng": torch.get_rng_state()}, remarks)
    run.close()
    trainer.close()
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
