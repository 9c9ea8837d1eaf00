"""The plan of a recipe on a number of GPUs: memory of each stage, whether it fits, and the time of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megafork.model import fp8, precision
from megafork.plan.deadlines import Deadlines
from megafork.plan.hardware import Gpu
from megafork.plan.layers import Layers, layers_of
from megafork.plan.memory import StageMemory, engines, stages
from megafork.plan.parameters import count_active, count_parameters
from megafork.plan.refit import planning_s
from megafork.plan.saving import Saving, saving
from megafork.plan.speed import Step, step_time
from megafork.recipe import Recipe, RecipeError
from megafork.shape import Shape, check_engines, check_layout, check_length, check_rollout_tp, check_world


@dataclass(frozen=True)
class Plan:
    """The result of `megafork plan`; figures in bytes and seconds."""

    recipe: Recipe
    shape: Shape
    gpus: int
    gpu: Gpu
    parameters: int
    """Of the whole model, each counted once however it is sharded."""
    active: int
    """Of these, the parameters that a token meets."""
    stages: list[StageMemory]
    step: Step
    mean_response: int | None
    """Tokens; None: assumed."""

    @property
    def dp(self) -> int:
        return self.gpus // self.recipe.parallel.model_size

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes on the fullest rank in each phase."""
        return {phase: max(stage.phases[phase] for stage in self.stages) for phase in self.stages[0].phases}

    @property
    def over(self) -> dict[str, int]:
        """Bytes beyond the GPU's memory in each phase that does not fit; `cache`: KV cache missing for one response."""
        engine = self.stages[0].engine
        over = {phase: peak - self.gpu.memory for phase, peak in self.peaks.items() if peak > self.gpu.memory}
        if engine.concurrent < 1:
            over["cache"] = engine.longest * engine.token - engine.cache
        return over

    @property
    def deadlines(self) -> Deadlines:
        """What a batch job needs."""
        return Deadlines.of(self.step)

    @property
    def saving(self) -> Saving:
        """A checkpoint, which the step's time does not include."""
        return saving(self.shape, self.recipe, self.gpus, [stage.weights for stage in self.stages])

    @property
    def refit_planning_s(self) -> float | None:
        """Seconds that a rank spends at the start of a run on planning its refits: measured now, on this machine. None with servers, to
        which whole tensors go. A refit plans nothing."""
        return None if self.recipe.rollout.servers else planning_s(self.shape, self.recipe, self.gpus)

    @property
    def fits(self) -> bool:
        return not self.over

    def with_changes(self, changes: Mapping[str, Any]) -> Plan:
        """The plan with other values for some `section.key`s. Raises ValueError if recipe, model or GPUs do not allow them."""
        return make_plan(self.shape, changed(self.recipe, changes), self.gpus, self.gpu, self.mean_response)

    @property
    def layers(self) -> Layers:
        return layers_of(self.recipe)

    @property
    def with_other_layers(self) -> Plan | None:
        """The plan with plain layers instead of fused ones, or the reverse; None if there are no others: in fp32, and experts in FP8."""
        precision = self.recipe.precision
        if precision.dtype != "bf16" or (precision.train_fp8 and self.shape.moe is not None):
            return None
        return self.with_changes({"model.kernels": "plain" if self.layers == "fused" else "fused", "parallel.cp_comm": None})

    def to_dict(self) -> dict[str, Any]:
        """The same numbers in machine-readable form."""
        engine, step, deadlines, other = self.stages[0].engine, self.step, self.deadlines, self.with_other_layers
        return {
            "gpu": self.gpu.name,
            "gpus": self.gpus,
            "gpu_memory": self.gpu.memory,
            "layout": {**self.recipe.parallel.model_dump(), "dp": self.dp, "recompute": self.recipe.model.recompute},
            "layers": self.layers,
            "other_layers": other and {"layers": other.layers, "seconds": other.step.seconds, "peaks": other.peaks},
            "parameters": self.parameters,
            "active_parameters": self.active,
            "stages": [_stage_numbers(stage) for stage in self.stages],
            "engine": {**vars(engine), "concurrent": engine.concurrent, "engines": engines(self.recipe, self.gpus)},
            "peaks": self.peaks,
            "over": self.over,
            "fits": self.fits,
            "step": {**vars(step), "seconds": step.seconds, "tokens_per_s_per_gpu": step.tokens_per_s_per_gpu},
            "checkpoint": vars(self.saving),
            "job": {**vars(deadlines), "hang": deadlines.hang},
        }


def make_plan(shape: Shape, recipe: Recipe, gpus: int, gpu: Gpu, mean_response: int | None = None) -> Plan:
    """Plan a recipe. Raises RecipeError if model or GPUs do not allow the layout; one that does not fit in memory still gets a plan."""
    if gpus < 1:
        raise RecipeError(f"--gpus is {gpus}: give the number of GPUs of the job, 1 or more")
    longest = recipe.rollout.max_response_length
    if mean_response is not None and not 1 <= mean_response <= longest:
        raise RecipeError(f"--mean-response is {mean_response}: give a number of tokens from 1 to rollout.max_response_length={longest}")
    check_layout(shape, recipe.parallel)
    check_world(recipe.parallel, gpus)
    if not recipe.rollout.servers:
        check_engines(recipe.rollout.tp, gpus)
    check_rollout_tp(shape, recipe.rollout.tp, whole_experts=recipe.rollout.whole_experts)
    check_length(shape, recipe.longest_sequence)
    precision.check_training(shape, recipe.precision, recipe.parallel, recipe.model.kernels)
    fp8.check_rollouts(shape, recipe)
    memory = stages(shape, recipe, gpus, gpu)
    step = step_time(shape, recipe, gpus, gpu, memory[0].engine, [stage.weights for stage in memory], mean_response)
    return Plan(recipe, shape, gpus, gpu, count_parameters(shape), count_active(shape), memory, step, mean_response)


def gpus_for(recipe: Recipe, gpus: int | None) -> int:
    """Number of GPUs to plan for: as given, else the recipe's ranks, else the fewest that both layout and roll-out engines divide."""
    engine = 1 if recipe.rollout.servers else recipe.rollout.tp
    return gpus if gpus is not None else recipe.run.ranks or math.lcm(recipe.parallel.smallest_world, engine)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values for some `section.key`s, validated again. Raises ValueError for an invalid combination."""
    values = recipe.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        values[section][key] = value
    return Recipe.model_validate(values)


def _stage_numbers(stage: StageMemory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": stage.layers,
        "parameters": stage.weights.parameters,
        "weights": stage.weights.weight_bytes,
        "gradients": stage.weights.gradient_bytes,
        "optimizer": max(stage.weights.optimizer_bytes),
        "activations": stage.activations.total,
        "in_flight": stage.activations.in_flight,
        "kept": stage.activations.kept,
        "working": stage.activations.working,
        "head": stage.activations.head,
        "routing": stage.activations.routing,
        "fp8_copies": stage.fp8_copies,
        "refit_buffer": stage.refit_buffer,
        "phases": stage.phases,
    }
