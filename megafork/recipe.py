"""The recipe: one YAML file that says all of a run.

Every key is declared here, with what it means. Unknown keys are refused and the nearest known key is named. `extends:` names a
base recipe that is read first; overrides from the command line (`section.key=value`) come last.

This module imports neither torch nor megatron, so that a wrong recipe is answered in a fraction of a second.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]


class RecipeError(ValueError):
    """The input of a run is wrong. The message is one line: field, value, and how to mend it. Exit code 2."""


class Section(BaseModel):
    """A strict section: unknown keys and wrong types are errors, and a section never changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Run(Section):
    name: str = Field("run", pattern="^[A-Za-z0-9._-]+$")
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Where run folders lie."""
    seed: int = Field(1, ge=0)
    """The one seed. Roll-outs, data order and `select: random` derive from it."""
    ranks: Count | None = None
    """Processes that `megafork train` starts on this machine. Empty: one a GPU, or tp x pp x cp without GPUs. Ignored under torchrun
    or Slurm, which have started the ranks already."""


class Model(Section):
    path: str
    """Hugging Face model folder (config.json, safetensors, tokenizer), or a hub name."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward: none, core attention only, or whole layers."""


class Parallel(Section):
    tp: Count = 1
    """Tensor parallel size: ranks that share each layer's weights."""
    pp: Count = 1
    """Pipeline parallel size: stages of consecutive layers."""
    vpp: Count = 1
    """Virtual pipeline size: model chunks a stage holds (interleaved schedule)."""
    cp: Count = 1
    """Context parallel size: ranks that share each sequence's tokens."""
    sp: bool = False
    """Sequence parallel: split norms and residuals over the TP ranks (needs tp > 1)."""

    @model_validator(mode="after")
    def _possible(self) -> Parallel:
        if self.sp and self.tp == 1:
            raise ValueError("parallel.sp is true but parallel.tp is 1: set parallel.sp=false, or a tp above 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp is {self.vpp} but parallel.pp is 1: set parallel.vpp=1, or a pp above 1")
        return self

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp


class Data(Section):
    train: str
    """Prompts to train on: a .jsonl or .parquet file, `hub:NAME[:SPLIT]` for a Hugging Face dataset, or
    `reasoning_gym:TASK[:SIZE[:SEED]]` for generated tasks."""
    eval: str | None = None
    """Held-out prompts, same forms as `train`. Empty: no evaluation."""
    template: str | None = None
    """Text with `{prompt}` that each prompt is put into. `chat` applies the tokenizer's chat template. Empty: the prompt as it is."""
    max_prompt_length: Count = 2048
    """Tokens. A longer prompt stops the run before it starts."""
    deduplicate: bool = True
    """Drop rows whose prompt occurred before (DAPO-Math's public file repeats rows)."""


class Rollout(Section):
    prompts: Count = 512
    """Prompts a step."""
    samples: int = Field(16, ge=1)
    """G, responses to each prompt."""
    max_response_length: Count = 20480
    """Tokens of a response at most, end-of-sequence included."""
    temperature: float = Field(1.0, gt=0.0, le=100.0)
    """T of the roll-out; log-probs and entropies are taken at it as well."""
    tp: Count = 1
    """Tensor parallel size of a vLLM engine; world size / tp engines serve the roll-out."""
    dynamic_sampling: bool = True
    """Drop groups whose responses are all right or all wrong, and sample others."""
    max_refills: int = Field(10, ge=0)
    """Rounds of dynamic sampling after the first before the step trains on what there is."""
    kv_cache_mb: Count | None = None
    """KV cache of an engine in MiB. Empty: `gpu_memory_fraction` of the GPU, or 256 without one."""
    gpu_memory_fraction: Fraction = 0.6
    """Share of a GPU's memory for vLLM's weights and KV cache."""
    max_running: Count = 256
    """Requests an engine decodes at once."""


class Reward(Section):
    verifier: str = "math"
    r"""`exact` (stripped text equal), `math` (math-verify on the last \boxed{} after </think>), `reasoning_gym` (the task's own
    scorer), or `FILE.py:FUNCTION` called as f(response_text, row) -> accuracy in [0, 1]."""
    scale: Literal["0/1", "+-1"] = "0/1"
    """Reward of a wrong and a right response."""
    timeout_s: float = Field(10.0, gt=0.0)
    """Seconds one verdict may take. Over it: scored 0, counted and reported."""
    workers: Count = 1
    """Verifier processes a rank."""
    overlong: Literal["shaping", "filter", "none"] = "shaping"
    """Long responses: a penalty growing over the last `overlong_buffer` tokens, no loss on truncated ones, or nothing."""
    overlong_buffer: Count = 4096
    """Tokens before max_response_length over which the penalty grows from 0 to -1."""


class Forks(Section):
    top_entropy_quantile: Fraction = 0.2
    """rho, the share of response tokens that is kept for the update."""
    select: Literal["top", "bottom", "random", "all"] = "top"
    """Which share is kept: highest entropy, lowest, random, or every token."""
    scope: Literal["batch", "minibatch", "microbatch", "sequence", "fixed"] = "minibatch"
    """Tokens that share one threshold. `batch` and `minibatch` give the same mask for every parallel layout; `fixed` uses
    `threshold`."""
    threshold: NonNegative | None = None
    """tau in nats for `scope: fixed` (the paper's 0.672)."""
    entropy_from: Literal["old", "current"] = "old"
    """Entropies of the policy that starts the step (free), or of the policy before each mini-batch (one more forward)."""
    normalize_by: Literal["selected", "response"] = "selected"
    """The loss's denominator counts the selected tokens, or all response tokens."""

    @model_validator(mode="after")
    def _fixed_needs_threshold(self) -> Forks:
        if (self.scope == "fixed") != (self.threshold is not None):
            raise ValueError(
                f"forks.threshold is {self.threshold} with forks.scope={self.scope}: give a threshold with scope=fixed, and only with it"
            )
        if self.scope == "fixed" and self.select in ("random", "all"):
            raise ValueError(f"forks.select is {self.select} with forks.scope=fixed: a fixed threshold selects `top` or `bottom`")
        return self


class Loss(Section):
    clip_low: float = Field(0.2, ge=0.0, lt=1.0)
    """eps_low: the ratio is clipped below at 1 - eps_low."""
    clip_high: NonNegative = 0.28
    """eps_high: the ratio is clipped above at 1 + eps_high."""
    dual_clip: float | None = Field(None, gt=1.0)
    """c: with a negative advantage the loss is at most c |A| (official code: 10)."""
    reduction: Literal["token-mean", "official", "seq-mean"] = "token-mean"
    """One exact mean over the mini-batch's tokens; the official code's mean a micro-batch weighted by its sequences; or a mean a
    response (GRPO)."""
    normalize_advantage: bool = True
    """Divide advantages by the group's standard deviation (Dr. GRPO: false)."""
    head_memory_mb: Count = 256
    """MiB for the one [chunk, vocabulary / TP] fp32 buffer of the log-prob and entropy head."""


class Optimizer(Section):
    lr: float = Field(1e-06, gt=0.0)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer updates over which the rate grows from 0 to `lr`."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up, down to `min_lr` at the last update."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a decay."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: float = Field(1e-08, gt=0.0)
    """Adam's epsilon."""
    grad_clip: NonNegative = 1.0
    """Global gradient norm at most this; 0 turns clipping off."""


class Precision(Section):
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations; with bf16 the optimizer keeps fp32 main weights."""


class Train(Section):
    steps: Count = 100
    """Steps of the run (sft: optimizer updates)."""
    minibatches: Count = 1
    """Optimizer updates a step; the step's prompts are divided evenly among them."""
    micro_batch_tokens: Count | None = None
    """Tokens packed into a micro-batch at most. Empty: just enough for the longest possible sequence."""


class Checkpoint(Section):
    every: int = Field(0, ge=0)
    """Save every N steps and after the last; 0 saves after the last step only."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    export_hf: bool = True
    """Write the trained model as a Hugging Face folder `hf/` after the last step."""


class Eval(Section):
    every: int = Field(0, ge=0)
    """Evaluate on data.eval every N steps; before the first and after the last step always."""
    samples: Count = 1
    """Responses to each held-out prompt."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Fraction = 1.0
    """Nucleus of the evaluation's sampling."""


class Log(Section):
    tensorboard: bool = True
    """Write tensorboard/ in the run folder."""
    rollouts_every: int = Field(1, ge=0)
    """Write rollouts/step_*.parquet every N steps; 0 never."""


class Recipe(Section):
    """One run. See the sections for every key."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    forks: Forks = Forks()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.rollout.prompts % self.train.minibatches:
            raise ValueError(
                f"train.minibatches is {self.train.minibatches} but rollout.prompts is {self.rollout.prompts}: "
                "choose a number of mini-batches that divides the prompts"
            )
        if self.rollout.samples < 2 and self.rollout.dynamic_sampling:
            raise ValueError("rollout.samples is 1: a group of one has no advantage; set rollout.samples to 2 or more (only sft uses 1)")
        if self.reward.overlong == "shaping" and self.reward.overlong_buffer > self.rollout.max_response_length:
            raise ValueError(
                f"reward.overlong_buffer is {self.reward.overlong_buffer} but rollout.max_response_length is "
                f"{self.rollout.max_response_length}: choose a smaller buffer, or reward.overlong=none"
            )
        if self.train.micro_batch_tokens is not None and self.train.micro_batch_tokens < self.longest_sequence:
            raise ValueError(
                f"train.micro_batch_tokens is {self.train.micro_batch_tokens} but one sequence may have {self.longest_sequence} tokens "
                "(data.max_prompt_length + rollout.max_response_length): raise it to at least that"
            )
        return self

    @property
    def longest_sequence(self) -> int:
        return self.data.max_prompt_length + self.rollout.max_response_length

    @property
    def micro_batch_tokens(self) -> int:
        return self.train.micro_batch_tokens or self.longest_sequence

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=140)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, the recipes it extends, and `section.key=value` overrides. Raises RecipeError."""
    values = _read(Path(path), seen=())
    for override in overrides or []:
        _apply(values, override)
    return _validate(values)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"extends: {path.name} extends itself by way of {seen[-1].name}: break the circle")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise RecipeError(f"recipe {str(path)!r} does not exist: give the path of a .yaml file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise RecipeError(f"recipe {str(path)!r} is not a text file: give the path of a .yaml file") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path.name!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path.name!r} holds {type(values).__name__}: it must be sections such as `model:` with keys below them")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"extends is {base!r}: give one recipe's path, relative to {path.name!r}")
    return _merge(_read(path.parent / base, (*seen, path)), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value, for example train.steps=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    inner = values.setdefault(section, {})
    if not isinstance(inner, dict):
        raise RecipeError(f"{section} is {inner!r}: it must be a section with keys below it")
    inner[key] = value


def _validate(values: dict[str, Any]) -> Recipe:
    _refuse_unknown(values)
    for name, value in values.items():
        if value is None:
            values[name] = {}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(item) for item in error.errors())) from None


def _refuse_unknown(values: dict[str, Any]) -> None:
    sections = Recipe.model_fields
    for section, inner in values.items():
        if section not in sections:
            raise RecipeError(f"unknown section {section!r}{_nearest(section, list(sections))}")
        if not isinstance(inner, dict | None):
            raise RecipeError(f"{section} is {inner!r}: it must be a section with keys below it")
        keys = list(sections[section].annotation.model_fields)  # type: ignore[union-attr]
        for key, value in (inner or {}).items():
            if key not in keys:
                raise RecipeError(f"unknown key {section}.{key} = {value!r}{_nearest(str(key), keys)}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def _explain(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{field} is missing: add it to the recipe or give {field}=..."
    return f"{field} is {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"
