"""The parts common to reinforcement learning and supervised runs: resuming, log, checkpoints, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megafork.files import whole
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe
from megafork.run_folder import ORIGIN, origin
from megafork.train.batch_job import BatchJob
from megafork.train.boards import Unhurried, open_boards
from megafork.train.clock import Clock
from megafork.train.inputs import Inputs, check_resume
from megafork.train.learner import Learner
from megafork.train.metrics import RunLog
from megafork.train.profile import profiled
from megafork.train.stopped import Stopped
from megafork.train.writer import Writer
from megafork.weights.checkpoint import Checkpoints
from megafork.weights.huggingface import write_folder
from megafork.weights.policy_weights import export_policy, load_policy

Metrics = dict[str, float | None]
Save = Callable[[int, Mapping[str, Any], Clock], None]
"""Takes a step, the state in addition to weights and optimizer, and the step's clock: `Run.save_if_due`."""
SKIPS_IN_A_ROW = 3
"""Consecutive updates without finite gradients after which a run stops."""


def unsaved(step: int, state: Mapping[str, Any], clock: Clock) -> None:
    """A `Save` that saves nothing."""


class Run:
    """Every rank creates one, after its learner, and all ranks call each method together, `begin` first. Only rank 0 writes the log."""

    def __init__(self, recipe: Recipe, mesh: Mesh, inputs: Inputs, learner: Learner) -> None:
        """Resume from the newest checkpoint, if there is one. Raises as `check_resume` does."""
        self.recipe = recipe
        self.mesh = mesh
        self.inputs = inputs
        self.learner = learner
        spec = recipe.checkpoint
        self.checkpoints = Checkpoints(recipe.run_folder / "checkpoints", mesh, keep_last=spec.keep_last, asynchronous=spec.background)
        self.writer = Writer()
        self.job = BatchJob(mesh)
        self.start = check_resume(recipe, inputs)
        """The last step completed by previous processes."""
        self._done = self._saved = self.start
        self._asked = False
        self.state: dict[str, Any] | None = None
        """The `state` last passed to `end_step` by the process that this one resumes."""
        if self.start:
            self.state = self.checkpoints.load(self.start, learner.chunks, learner.optimizer)
            learner.update = self.state["update"]
        self._log: RunLog | None = None

    def begin(self, *, show_every: int = 1) -> None:
        """Open the log; called once everything that may fail has started. Raises RecipeError if an existing log is damaged."""
        self.job.beat(self.start, "begins")
        if self.mesh.is_rank_zero:
            self._log = self._open_log(show_every)

    @property
    def steps(self) -> Iterable[int]:
        """The remaining steps."""
        return range(self.start + 1, self.recipe.train.steps + 1)

    @contextmanager
    def step(self, step: int) -> Iterator[Clock]:
        """Wraps the work of a step: yields its clock, whose phases are signs of life, and profiles the step if the recipe asks for it."""
        with profiled(self.recipe, step, self.mesh):
            yield Clock(partial(self.job.beat, step))

    def log(self, metrics: Metrics, remarks: Iterable[str] = ()) -> None:
        if self._log is not None:
            self._log.write(metrics)
            for remark in remarks:
                self._log.note(remark)

    def amend(self, metrics: Metrics) -> None:
        """Add missing metrics to the last step done by a previous process."""
        if self._log is not None:
            self._log.amend(self.start, metrics)

    def save_if_due(self, step: int, state: Mapping[str, Any], clock: Clock) -> None:
        """Write a checkpoint of the step that is about to end, if one is due or the run has to end after it; `end_step` publishes it.

        `state`: needed by the next step in addition to weights and optimizer.
        """
        if self._due(step):
            with clock("checkpoint"):
                self._save(step, state)

    def end_step(self, metrics: Metrics, state: Mapping[str, Any], remarks: Iterable[str] = (), *, stop: str | None = None) -> None:
        """Log the step, and save a checkpoint if one is due and `save_if_due` has not.

        Raises Stopped, after saving a checkpoint, if gradients were not finite `SKIPS_IN_A_ROW` times, if there is a reason to `stop`, or
        if the batch job requests it.
        """
        step = self._done = int(metrics["step"] or 0)
        self.log(metrics, remarks)  # before the checkpoint is published: a run killed in between repeats the step and its line
        if (self._due(step) or stop is not None) and self._saved != step:
            self.job.beat(step, "checkpoint")
            self._save(step, state)
        if self._saved == step:
            self.writer.settle()  # a run that continues after the checkpoint does not repeat what comes before it
        skipping = self.learner.skips_in_a_row >= SKIPS_IN_A_ROW
        self.checkpoints.settle(wait=skipping or self._asked or stop is not None)
        self.job.ended(step)
        if self._asked:
            self.job.stopped(step)
            raise Stopped(f"step {step}: stopped because the batch job asked for it, with a checkpoint; the same command continues")
        if stop is not None:
            raise Stopped(f"step {step}: {stop}. The weights are saved; the same command continues")
        if skipping:
            raise Stopped(
                f"step {step}: gradients were not finite {self.learner.skips_in_a_row} updates in a row. These were skipped, and the "
                f"weights are saved as they were before: look at grad_norm in {self.recipe.run_folder / 'metrics.jsonl'}, then continue "
                "with a smaller optimizer.lr or precision.dtype=fp32"
            )

    def close(self) -> None:
        """Wait for the last checkpoint and for files still being written, and export the model."""
        self.writer.settle()
        self.checkpoints.settle(wait=True)
        if self.recipe.checkpoint.export_hf:
            self._export_hf()
        if self._log is not None:
            self._log.close()

    def _due(self, step: int) -> bool:
        """Whether the step needs a checkpoint, as far as can be known by now. The same on every rank; all must call."""
        steps, every = self.recipe.train.steps, self.recipe.checkpoint.every
        self._asked = self.job.wants_stop() and step < steps
        skipping = self.learner.skips_in_a_row >= SKIPS_IN_A_ROW
        return self._asked or skipping or step == steps or bool(every and step % every == 0)

    def _save(self, step: int, state: Mapping[str, Any]) -> None:
        self.learner.settle()
        run = {"step": step, "update": self.learner.update, "recipe": self.recipe.model_dump(mode="json"), **self.inputs.identity, **state}
        self.checkpoints.write(step, self.learner.chunks, self.learner.optimizer, run)
        self._saved = step

    def _export_hf(self) -> None:
        """Write the trained model to the run's Hugging Face folder `hf/`, by rank 0."""
        self.job.beat(self._done, "export")
        self.learner.settle()
        weights = export_policy(self.learner.chunks, self.inputs.shape, self.mesh)
        if self.mesh.is_rank_zero:
            notes = {ORIGIN: origin(self.recipe, self._done)}
            write_folder(self.recipe.run_folder / "hf", weights, like=Path(self.recipe.model.path), notes=notes)
        else:
            for _ in weights:  # the gather needs every rank
                pass
        dist.barrier()

    def _open_log(self, show_every: int) -> RunLog:
        folder = self.recipe.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "recipe.yaml") as unfinished:
            unfinished.write_text(self.recipe.to_yaml())
        return RunLog(
            folder,
            steps=self.recipe.train.steps,
            resume_step=self.start,
            boards=[Unhurried(board, self.writer) for board in open_boards(self.recipe, self.start)],
            text=self.recipe.log.text,
            show_every=show_every,
        )


def build_learner(inputs: Inputs, recipe: Recipe, mesh: Mesh, *, updates: int) -> Learner:
    """Build the model with its Hugging Face weights and its optimizer. Every rank must call."""
    chunks = build_policy(inputs.shape, PolicyConfig.of(recipe), mesh)
    load_policy(chunks, inputs.weights, inputs.shape, mesh)
    return Learner(chunks, recipe, mesh, updates=updates)
