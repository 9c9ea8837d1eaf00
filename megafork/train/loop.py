"""Reinforcement learning: the step, and the run around it. One program, the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from megafork.data.reward import Verifiers
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world
from megafork.recipe import Recipe
from megafork.rl import prefix
from megafork.rl.batch import MicroBatch
from megafork.rl.packing import packer, placement
from megafork.run_folder import is_evaluated
from megafork.train.clock import Clock
from megafork.train.engines import BuildEngine, build_engine
from megafork.train.inputs import Inputs
from megafork.train.learner import Learner
from megafork.train.offload import Offload
from megafork.train.prefetch import Prefetch
from megafork.train.redistribute import RoutingSize, redistribute
from megafork.train.remarks import Remarks, all_failed, mismatch
from megafork.train.rollout_files import RolloutFiles, write_evaluation
from megafork.train.run import Metrics, Run, Save, build_learner, unsaved
from megafork.train.sampler import Collected, Outcome, Sampler
from megafork.train.stopped import Stopped
from megafork.train.summary import staleness
from megafork.train.update import update_policy
from megafork.train.writer import Writer


class Trainer:
    """A run's parts, and its step. Every rank creates one, and all ranks call each method together."""

    def __init__(
        self, recipe: Recipe, mesh: Mesh, inputs: Inputs, learner: Learner, build: BuildEngine = build_engine, writer: Writer | None = None
    ) -> None:
        """`learner`: in its state after the last step. `build`: creates the roll-out engine, as `build_engine` does. `writer`: writes the
        files of roll-outs; by default the trainer's own."""
        self.recipe = recipe
        self.mesh = mesh
        self.inputs = inputs
        self.learner = learner
        self.offload = Offload(learner.model, learner.optimizer, mesh.device)
        if recipe.rollout.park_training:
            self.offload.to_host()  # an engine allocates its memory when it is created
        self.engine = build(recipe, mesh, learner.chunks, inputs.shape)
        self.verifiers = Verifiers(recipe.reward) if self.engine.rank == 0 else None
        self.sampler = Sampler(recipe, inputs.train, self.engine, self.verifiers, inputs.tokenizer, mesh)
        self.prefetch = Prefetch(self.sampler)
        self.rollout_files = RolloutFiles(recipe, inputs, mesh, writer or Writer())
        self.sampled = self.sampler.state()
        """The sampler's state after the last step's responses, for the checkpoint."""
        moe = inputs.shape.moe if recipe.routing_from == "rollout" else None
        self.routing = RoutingSize(inputs.shape.layers, moe.per_token, moe.experts) if moe else None
        """The routing that responses carry."""
        self.reward_error: str | None = None
        """The reason for the first response that could not be judged; the same on every rank."""
        self.example = ""
        """A prompt of the last step and a response to it; rank 0 only."""
        self._compared = False
        """Whether roll-out and trainer have been found to compute the same model."""

    def step(self, step: int, clock: Clock | None = None, save: Save = unsaved) -> Metrics:
        """Roll out, reward, score, select forks, update, refit. Returns the step's metrics, the same on every rank.

        `save`: told the state after the update while the engine still sleeps, when a checkpoint has the most memory.
        """
        clock = clock or Clock()
        with clock("rollout"):
            collected = self.prefetch.collect(step)
            self.sampled, self.example = collected.state, collected.example
            self.engine.sleep()
            self.offload.to_device()
        minibatches = self.place(collected, step)
        everything = [micro for mini in minibatches for micro in mini]
        updated: Metrics = {}
        if everything:
            check = None if self._compared else partial(self.compare, step=step)
            updated |= update_policy(self.learner, minibatches, self.recipe, step=step, clock=clock, check=check)
            self.rollout_files.write(step, everything)
        save(step, {**self.sampled, "rng": torch.get_rng_state()}, clock)
        with clock("refit"):
            if self.recipe.rollout.park_training:
                self.offload.to_host()
            self.engine.wake("weights")
            self.refit(step)
            self.engine.wake("kv_cache")
        metrics = self.sample_metrics(collected, everything) | staleness(collected.responses, step, self.mesh)
        metrics |= updated | self.engine.refit_metrics()
        clock.times["reward"] = over_world([collected.reward_seconds], self.mesh, "max")[0]
        return metrics | clock.metrics(collected.sampled_tokens, self.mesh)

    def place(self, collected: Collected, step: int) -> list[list[MicroBatch]]:
        """Send each response to the ranks that train on it, and cut it there (`forks.select: prefix`).

        Returns this rank's packed micro-batches of each non-empty mini-batch."""
        plans: list[list[list[Outcome]]] = []
        dp_rank_of: dict[tuple[int, int], int] = {}
        for groups in _split(collected.groups, self.recipe.train.minibatches):
            outcomes = [outcome for outcome in collected.outcomes if outcome.group in groups]
            lengths = [o.prompt_tokens + prefix.kept(o.tokens, o.group, o.sample, self.recipe, step=step) - 1 for o in outcomes]
            placed = placement(lengths, self.recipe.micro_batch_tokens, self.mesh)
            for rank, micros in enumerate(placed):
                dp_rank_of |= {(outcomes[n].group, outcomes[n].sample): rank for n in itertools.chain(*micros)}
            plans.append([[outcomes[n] for n in members] for members in placed[self.mesh.dp_rank]])
        entropies = self.recipe.forks.entropy_from == "rollout"
        received = redistribute(collected.responses, collected.outcomes, dp_rank_of, self.mesh, entropies=entropies, routing=self.routing)
        mine = {(r.group, r.sample): prefix.cut(r, self.recipe, step=step) for r in received}
        packed = packer(self.mesh, whole=self.recipe.micro_batch_padding, temperature=self.recipe.rollout.temperature)
        return [[packed([mine[o.group, o.sample] for o in members]) for members in micros] for micros in plans]

    def compare(self, metrics: Mapping[str, float], step: int) -> None:
        """Raise Stopped if the first step's comparison shows that roll-out and trainer do not compute the same model."""
        if reason := mismatch(metrics, self.recipe):
            raise Stopped(f"step {step}: {reason}")
        self._compared = True

    def refit(self, version: int) -> None:
        """Hand the current weights to the engines. Returns with every rank's engine at `version`."""
        self.learner.settle()
        self.engine.refit(version)
        dist.barrier()  # no rank asks another's engine for tokens before it has the new weights

    def sample_metrics(self, collected: Collected, micros: list[MicroBatch]) -> Metrics:
        outcomes = collected.outcomes
        helpful = sum(response.advantage != 0.0 for response in collected.responses)
        errors, padding, tokens, learned = over_world(
            [collected.errors, sum(m.padding for m in micros), sum(sum(m.lengths) for m in micros), helpful], self.mesh
        )
        if errors and self.reward_error is None:
            self.reward_error = self._first(collected.first_error)
        return {
            "accuracy/mean": collected.sampled_accuracy,
            "reward/mean": sum(outcome.reward for outcome in outcomes) / len(outcomes) if outcomes else None,
            "reward/errors": errors,
            "response_length/mean": collected.sampled_tokens / collected.sampled,
            "response_length/truncated": collected.sampled_truncated / collected.sampled,
            "sampling/responses": collected.sampled,
            "sampling/refills": collected.refills,
            "sampling/groups": len(collected.groups),
            "sampling/with_advantage": learned,
            "rollout/idle_share": 1.0 - collected.busy_s / collected.span_s if self.engine.engines > 1 and collected.span_s else None,
            "packing/padding": padding / max(tokens, 1),
        }

    def evaluate(self, step: int) -> Metrics:
        """Accuracy on the held-out prompts, or {} if there are none. Rank 0 writes each prompt's accuracy to a file for `step`."""
        if not self.inputs.held_out:
            return {}
        found = self.prefetch.evaluate(self.inputs.held_out)
        if found.metrics["eval/errors"] == found.responses:
            self.rollout_files.settle()
            raise Stopped(all_failed(found.responses, self._first(found.first_error)))
        if self.mesh.is_rank_zero:
            write_evaluation(self.recipe.run_folder, step, found.accuracies, self.inputs.held_out)
        return dict(found.metrics)

    def _first(self, error: str | None) -> str:
        """The error of the lowest rank that has one, on every rank."""
        errors: list[str | None] = [None] * self.mesh.world
        dist.all_gather_object(errors, error)
        return next(error for error in errors if error)

    def close(self) -> None:
        self.rollout_files.settle()
        if self.verifiers is not None:
            self.verifiers.close()
        self.engine.close()


def train(recipe: Recipe, mesh: Mesh, inputs: Inputs) -> Metrics:
    """Run or resume a whole run. Every rank must call. Returns the last step's metrics with the held-out accuracy."""
    updates = recipe.train.steps * recipe.train.minibatches
    learner = build_learner(inputs, recipe, mesh, updates=updates)
    run = Run(recipe, mesh, inputs, learner)
    trainer = Trainer(recipe, mesh, inputs, learner, writer=run.writer)
    trainer.engine.progress = run.job.progress
    run.begin()
    if run.state is not None:
        trainer.sampler.restore(run.state)
        torch.set_rng_state(run.state["rng"])
    trainer.refit(run.start)
    if run.start == 0:
        run.log({"step": 0, **trainer.evaluate(0)})
    if run.start == recipe.train.steps and not is_evaluated(recipe, run.start):  # the previous process was killed before it
        run.amend(trainer.evaluate(run.start))
    last: Metrics = {}
    remarks = Remarks(recipe)
    for step in run.steps:
        with run.step(step) as clock:
            last = {"step": step, **trainer.step(step, clock, run.save_if_due)}
        if step == recipe.train.steps or (recipe.eval.every and step % recipe.eval.every == 0):
            last |= trainer.evaluate(step)
        told = list(remarks.after(last, first=step == run.start + 1, error=trainer.reward_error, example=trainer.example))
        run.end_step(last, {**trainer.sampled, "rng": torch.get_rng_state()}, told, stop=remarks.stop)
    run.close()
    trainer.close()
    return last


def _split(groups: list[int], parts: int) -> list[set[int]]:
    """Split groups, in order, into `parts` mini-batches as evenly as possible; empty ones are left out."""
    bounds = [len(groups) * n // parts for n in range(parts + 1)]
    return [set(groups[low:high]) for low, high in itertools.pairwise(bounds) if high > low]
