"""What every run has, reinforcement learning or supervised: checked inputs, the model, checkpoints, a log, an export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megafork.data import reward
from megafork.data.prompts import Prompt, fingerprint, load_prompts
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.model.qwen3 import build_policy
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe, RecipeError
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.packing import pack, padding_multiple
from megafork.shape import Shape, check_layout, read_shape
from megafork.train.metrics import RunLog
from megafork.train.update import Learner
from megafork.weights import checkpoint
from megafork.weights.huggingface import HuggingFaceWeights, write_folder
from megafork.weights.policy_weights import export_policy, load_policy

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads, checked against each other."""

    supervised: bool
    shape: Shape
    weights: HuggingFaceWeights
    tokenizer: Tokenizer
    train: list[Prompt]
    held_out: list[Prompt]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must stay the same from a run's start to its end. Reads all prompts, so once a process."""
        return {"supervised": self.supervised, "shape": asdict(self.shape), "data": fingerprint(self.train)}


def read_inputs(recipe: Recipe, *, supervised: bool) -> Inputs:
    """Read and check model folder, tokenizer and data. Raises RecipeError. No process group is needed."""
    folder = Path(recipe.model.path)
    shape = read_shape(folder)
    check_layout(shape, recipe.parallel)
    if not supervised:
        _check_rollout(shape, recipe)
        reward.check(recipe.reward)
    weights = HuggingFaceWeights(folder)
    weights.check(shape)
    tokenizer = load_tokenizer(recipe.model.path)
    if tokenizer.vocab_size > shape.vocab:
        raise RecipeError(
            f"model.path is {recipe.model.path!r}: its tokenizer has {tokenizer.vocab_size} tokens but the model only {shape.vocab}: "
            "give a folder whose tokenizer belongs to the model"
        )
    if not tokenizer.eos_ids:
        raise RecipeError(
            f"model.path is {recipe.model.path!r}: neither its tokenizer nor generation_config.json names an end-of-sequence token"
        )
    needs = ("response",) if supervised else reward.needs(recipe.reward)
    train = load_prompts(recipe.data.train, recipe.data, tokenizer, needs=needs)
    held_out = load_prompts(recipe.data.eval, recipe.data, tokenizer, needs=needs, field="data.eval") if recipe.data.eval else []
    return Inputs(supervised, shape, weights, tokenizer, train, held_out)


def _check_rollout(shape: Shape, recipe: Recipe) -> None:
    if shape.heads % recipe.rollout.tp:
        raise RecipeError(
            f"rollout.tp is {recipe.rollout.tp} but the model has {shape.heads} attention heads: choose a tp that divides them"
        )
    if shape.max_positions and recipe.longest_sequence > shape.max_positions:
        raise RecipeError(
            f"data.max_prompt_length + rollout.max_response_length is {recipe.longest_sequence} but the model knows {shape.max_positions} "
            "positions (max_position_embeddings): shorten one of them"
        )


def build_learner(inputs: Inputs, recipe: Recipe, mesh: Mesh, *, updates: int, temperature: float = 1.0) -> Learner:
    """The model with its Hugging Face weights and its optimizer. Every rank calls."""
    chunks = build_policy(inputs.shape, recipe, mesh)
    load_policy(chunks, inputs.weights, inputs.shape, mesh)
    return Learner(chunks, recipe, mesh, updates=updates, temperature=temperature)


def packer(mesh: Mesh) -> Callable[[list[Response]], MicroBatch]:
    """Packs responses into a micro-batch as this rank sees it."""
    multiple = padding_multiple(mesh.layout)
    return partial(pack, cp=mesh.layout.cp, cp_rank=mesh.cp_rank, multiple=multiple, device=mesh.device)


def save_checkpoint(step: int, learner: Learner, recipe: Recipe, inputs: Inputs, state: Mapping[str, Any]) -> None:
    """A checkpoint after `step`. Every rank calls."""
    run = {"step": step, "update": learner.update, "recipe": recipe.model_dump(mode="json"), **inputs.identity, **state}
    folder = checkpoint.folder_of(recipe.run_folder / "checkpoints", step)
    checkpoint.save(folder, learner.chunks, learner.optimizer, learner.mesh, run, keep_last=recipe.checkpoint.keep_last)


def check_resume(recipe: Recipe, inputs: Inputs) -> int:
    """The step that the run's newest checkpoint holds, 0 without any. Needs no process group.

    Raises RecipeError when it is damaged, or when the recipe now names another model or other data than the run was started with.
    """
    found = checkpoint.complete(recipe.run_folder / "checkpoints")
    if not found:
        return 0
    step, folder = found[-1]
    state, mine = checkpoint.read_state(folder), inputs.identity
    mend = f"the run {recipe.run.name!r} was started with: restore it, or choose another run.name"
    if state["supervised"] != inputs.supervised:
        other = "megafork sft" if state["supervised"] else "megafork train"
        raise RecipeError(f"run.name is {recipe.run.name!r}, which is a run of `{other}`: choose another run.name")
    for name, value in mine["shape"].items():
        if state["shape"][name] != value:
            raise RecipeError(f"model.path is {recipe.model.path!r}: its {name} is {value}, not the {state['shape'][name]} that {mend}")
    if state["data"] != mine["data"]:
        raise RecipeError(f"data.train is {recipe.data.train!r}, which is not what {mend}")
    return step


def resume(learner: Learner, recipe: Recipe, inputs: Inputs) -> dict[str, Any] | None:
    """Load the run's newest checkpoint; None when there is none. Every rank calls. Raises what `check_resume` raises."""
    step = check_resume(recipe, inputs)
    if step == 0:
        return None
    folder = checkpoint.folder_of(recipe.run_folder / "checkpoints", step)
    state = checkpoint.load(folder, learner.chunks, learner.optimizer, learner.mesh)
    learner.update = state["update"]
    return state


def export_hf(learner: Learner, inputs: Inputs, recipe: Recipe) -> None:
    """The trained model as the Hugging Face folder `hf/` of the run, written by rank 0. Every rank calls."""
    weights = export_policy(learner.chunks, inputs.shape, learner.mesh)
    if learner.mesh.is_rank_zero:
        write_folder(recipe.run_folder / "hf", weights, like=Path(recipe.model.path))
    else:
        for _ in weights:  # the gather needs every rank
            pass
    dist.barrier()


def open_log(recipe: Recipe, mesh: Mesh, start: int, *, show_every: int = 1) -> RunLog | None:
    """The run folder's log, on rank 0."""
    if not mesh.is_rank_zero:
        return None
    folder = recipe.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return RunLog(folder, steps=recipe.train.steps, resume_step=start, tensorboard=recipe.log.tensorboard, show_every=show_every)


def log_metrics(log: RunLog | None, metrics: Metrics) -> None:
    if log is not None:
        log.write(metrics)
