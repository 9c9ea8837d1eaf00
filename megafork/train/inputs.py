"""A run's inputs: model folder, tokenizer and data, checked against each other and against the run's checkpoint. No ranks needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megafork.data import reward
from megafork.data.prompts import Prompt, fingerprint, load_prompts, without_training_prompts
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.recipe import Key, Recipe, RecipeError
from megafork.shape import Shape, check_layout, check_length, check_rollout_tp, read_shape
from megafork.weights import checkpoint
from megafork.weights.huggingface import HuggingFaceWeights


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads, cross-checked."""

    supervised: bool
    shape: Shape
    weights: HuggingFaceWeights
    tokenizer: Tokenizer
    train: list[Prompt]
    held_out: list[Prompt]
    remarks: list[str] = field(default_factory=list)
    """Lines about rows that were dropped from the data."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Properties that must not change during a run. Cached, as it reads all prompts."""
        return {"supervised": self.supervised, "shape": asdict(self.shape), "data": fingerprint(self.train)}


def read_inputs(recipe: Recipe, *, supervised: bool) -> Inputs:
    """Read and check model folder, tokenizer and data. Raises RecipeError. Needs no process group."""
    folder = Path(recipe.model.path)
    shape = read_shape(folder)
    check_layout(shape, recipe.parallel)
    if recipe.loss.expert_balance and shape.moe is None:
        raise RecipeError(f"loss.expert_balance is {recipe.loss.expert_balance:g} but the model is dense, it has no experts: leave it out")
    if recipe.rollout.routing == "replay" and shape.moe is None:
        raise RecipeError("rollout.routing is replay but the model is dense, it has no experts: leave it out")
    if not supervised:
        _check_rollout(shape, recipe)
        reward.check_verifier(recipe.reward)
    weights = HuggingFaceWeights(folder)
    weights.check(shape)
    tokenizer = load_tokenizer(recipe.model.path)
    tokenizer.check(shape.vocab, Key("model.path"), f" is {recipe.model.path!r}")
    needs = ("response",) if supervised else reward.needs(recipe.reward)
    check_row = None if supervised else reward.check_row(recipe.reward)
    load = partial(load_prompts, data=recipe.data, tokenizer=tokenizer, needs=needs, check_row=check_row)
    remarks: list[str] = []
    train = load(recipe.data.train, remark=remarks.append)
    held_out: list[Prompt] = []
    if recipe.data.eval is not None and not supervised:
        held_out = load(recipe.data.eval, field="data.eval", remark=remarks.append)
        held_out = without_training_prompts(held_out, train, recipe.data.eval, remarks.append)
    return Inputs(supervised, shape, weights, tokenizer, train, held_out, remarks)


def _check_rollout(shape: Shape, recipe: Recipe) -> None:
    if recipe.rollout.samples == 1:
        raise RecipeError("rollout.samples is 1: a group of one has no advantage; set rollout.samples to 2 or more (only sft uses 1)")
    check_rollout_tp(shape, recipe.rollout.tp, whole_experts=recipe.rollout.whole_experts)
    check_length(shape, recipe.longest_sequence)


def check_resume(recipe: Recipe, inputs: Inputs) -> int:
    """The step of the run's newest checkpoint, 0 without one. Needs no process group.

    Raises RecipeError if it is damaged, or if the run was started with another model, other data or another seed.
    """
    found = checkpoint.complete(recipe.run_folder / "checkpoints")
    if not found:
        return 0
    step, folder = found[-1]
    state, mine = checkpoint.read_state(folder), inputs.identity
    fix = f"the run {recipe.run.name!r} was started with: restore it, or choose another run.name"
    if state["supervised"] != inputs.supervised:
        other = "megafork sft" if state["supervised"] else "megafork train"
        raise RecipeError(f"run.name is {recipe.run.name!r}, which is a run of `{other}`: choose another run.name")
    for name, value in mine["shape"].items():
        if (before := state["shape"].get(name)) != value:
            raise RecipeError(f"model.path is {recipe.model.path!r}: its {name} is {value}, not the {before} that {fix}")
    if state["data"] != mine["data"]:
        raise RecipeError(f"data.train is {recipe.data.train!r}, which is not what {fix}")
    if (seed := state["recipe"]["run"]["seed"]) != recipe.run.seed:
        raise RecipeError(f"run.seed is {recipe.run.seed}, not the {seed} that {fix}")
    return step
