"""The recipe: one YAML file that says all of a run.

Every key is declared here, with what it means; `recipe_file.py` reads the file. Paths in a recipe are relative to the directory in which
the command runs.

This module imports neither torch nor megatron, so that a wrong recipe is answered in a fraction of a second.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from megafork.kinds import AboveOne, BelowOne, Count, CountOrZero, Fraction, NonNegative, Positive, Section, Temperature


class RecipeError(ValueError):
    """The input of a run is wrong. The message is one line: field, value, and how to mend it. Exit code 2."""


class Run(Section):
    name: str = "run"
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Where run folders lie."""
    seed: CountOrZero = 1
    """The one seed. Roll-outs, data order and `select: random` derive from it."""
    ranks: Count | None = None
    """Processes that `megafork train` starts on this machine. Empty: one a GPU, or tp x pp x cp without GPUs. Ignored under torchrun
    or Slurm, which have started the ranks already."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"run.name is {name!r}: it names a folder, use letters, digits, `_`, `-` and `.`, and do not begin with `-` or `.`"
            )
        return name


class Model(Section):
    path: str
    """Hugging Face model folder (config.json, safetensors, tokenizer), or `owner/model` on the hub."""
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
    first_stage_layers: Count | None = None
    """Layers of the first pipeline stage, which also holds the embedding. Empty: as many as the stages between."""
    last_stage_layers: Count | None = None
    """Layers of the last pipeline stage, which also holds the head. Empty: as many as the stages between."""

    @model_validator(mode="after")
    def _possible(self) -> Parallel:
        if self.sp and self.tp == 1:
            raise ValueError("parallel.sp is true but parallel.tp is 1: set parallel.sp=false, or a tp above 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp is {self.vpp} but parallel.pp is 1: set parallel.vpp=1, or a pp above 1")
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) is not None and self.pp == 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)} but parallel.pp is 1: leave it out, or set a pp above 1")
        return self

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def sequence_multiple(self) -> int:
        """To what multiple each sequence is padded: 2 cp chunks a sequence, and tokens that the sequence-parallel ranks share evenly."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)

    @property
    def micro_batch_multiple(self) -> int:
        """To what multiple the number of micro-batches is raised: the interleaved schedule wants whole rounds of all stages."""
        return self.pp if self.vpp > 1 else 1


class Data(Section):
    train: str
    """Prompts to train on: a .jsonl or .parquet file, `hub:NAME[@SUBSET][:SPLIT]` for a Hugging Face one (`hub:openai/gsm8k@main:test`),
    or `reasoning_gym:TASK[:SIZE[:SEED]]` for generated tasks."""
    eval: str | None = None
    """Held-out prompts, same forms as `train`. Empty: no evaluation."""
    template: str | None = None
    """Text with `{prompt}` that each prompt is put into. `chat` applies the tokenizer's chat template. Empty: the prompt as it is."""
    max_prompt_length: Count = 2048
    """Tokens. A longer prompt stops the run before it starts."""
    deduplicate: bool = True
    """Drop rows whose prompt occurred before (DAPO-Math's public file repeats rows)."""

    @model_validator(mode="after")
    def _held_out(self) -> Data:
        if self.eval is not None and Path(self.eval).resolve() == Path(self.train).resolve():
            raise ValueError(f"data.eval is {self.eval!r}, the same as data.train: hold other prompts out, or leave data.eval empty")
        return self


class Rollout(Section):
    prompts: Count = 512
    """Prompts a step."""
    samples: Count = 16
    """G, responses to each prompt."""
    max_response_length: Count = 20480
    """Tokens of a response at most, end-of-sequence included."""
    temperature: Temperature = 1.0
    """T of the roll-out; log-probs and entropies are taken at it as well."""
    fork_temperature: Annotated[tuple[Temperature, Temperature, NonNegative], Field(strict=False)] | None = None
    """[low, high, threshold], in the place of `temperature`: `high` where the entropy of the next token at temperature 1 is above
    `threshold` nats (the paper's 0.672), `low` elsewhere. Log-probs are then taken at each token's own temperature, entropies at 1."""
    tp: Count = 1
    """Tensor parallel size of a vLLM engine; world size / tp engines serve the roll-out."""
    dynamic_sampling: bool = True
    """Drop groups whose responses are all right or all wrong, and sample others."""
    max_refills: CountOrZero = 10
    """Rounds of dynamic sampling after the first before the step trains on what there is."""
    kv_cache_mb: Count | None = None
    """KV cache of an engine in MiB. Empty: `gpu_memory_fraction` of the GPU, or 256 without one."""
    gpu_memory_fraction: Fraction = 0.6
    """Share of a GPU's memory for vLLM's weights and KV cache."""
    park_training: bool = False
    """Keep gradients and optimizer state off the GPU while vLLM has it: room for a larger `gpu_memory_fraction`, for a way to host memory
    and back every step. Not with `servers`, which have GPUs of their own."""
    max_running: Count = 256
    """Requests an engine decodes at once."""
    servers: list[str] = Field(default=[])
    """Addresses (`http://HOST:PORT`) of vLLM servers, each started by `python -m megafork.rollout.serve RECIPE`. Empty: engines in the
    trainer's own processes."""
    staleness: CountOrZero = 0
    """Steps by which the weights that write a token may be behind: so many steps are rolled out ahead, while others train, and go on with
    new weights as these come. 0: each step with the weights before it. Above 0 it needs `servers` and `loss.importance_cap`."""
    request_limit_s: Positive = 3600.0
    """Seconds one response of a server may take. Over it: another server is asked."""
    server_limit_s: Positive = 300.0
    """Seconds a server may take for a part of a refit, and a run goes on without any server."""

    @field_validator("servers")
    @classmethod
    def _are_addresses(cls, servers: list[str]) -> list[str]:
        for url in servers:
            if not re.fullmatch(r"http://[^/:\s]+:\d{1,5}", url):
                raise ValueError(f"rollout.servers has {url!r}: give addresses such as http://node1:8000")
        if len(set(servers)) < len(servers):
            raise ValueError(f"rollout.servers is {servers}: it names a server twice")
        return servers

    @model_validator(mode="after")
    def _keys_agree(self) -> Rollout:
        if self.fork_temperature and self.temperature != 1:
            raise ValueError(f"rollout.temperature is {self.temperature} beside rollout.fork_temperature, which takes its place: drop one")
        if self.staleness and not self.servers:
            raise ValueError(
                f"rollout.staleness is {self.staleness} without rollout.servers: engines in the trainer's own processes wait for it; "
                "name servers, or set rollout.staleness=0"
            )
        if self.park_training and self.servers:
            raise ValueError("rollout.park_training is true with rollout.servers: these leave the trainer its GPUs; set it to false")
        return self


class Reward(Section):
    verifier: str = "math"
    r"""`exact` (stripped text equal), `math` (math-verify on the last \boxed{} after </think>), `reasoning_gym` (the task's own
    scorer), or `FILE.py:FUNCTION` called as f(response_text, row) -> accuracy in [0, 1]."""
    scale: Literal["0/1", "+-1"] = "0/1"
    """Reward of a wrong and a right response."""
    timeout_s: Positive = 10.0
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
    """Tokens that share one threshold. `batch` and `minibatch` give the same mask for every parallel layout; `fixed` uses `threshold`."""
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
        if self.scope == "batch" and self.entropy_from == "current":
            raise ValueError(
                "forks.entropy_from is current with forks.scope=batch: one threshold for the whole step knows only the policy that "
                "starts it; choose scope=minibatch, or entropy_from=old"
            )
        if self.scope == "fixed" and self.select in ("random", "all"):
            raise ValueError(f"forks.select is {self.select} with forks.scope=fixed: a fixed threshold selects `top` or `bottom`")
        return self


class Loss(Section):
    clip_low: BelowOne = 0.2
    """eps_low: the ratio is clipped below at 1 - eps_low."""
    clip_high: NonNegative = 0.28
    """eps_high: the ratio is clipped above at 1 + eps_high."""
    dual_clip: AboveOne | None = None
    """c: with a negative advantage the loss is at most c |A| (official code: 10)."""
    importance_cap: Positive | None = None
    """C: each token's loss is weighted by min(p_old / p_rollout, C), for roll-outs of older weights or another precision. Empty: by 1."""
    reduction: Literal["token-mean", "official", "seq-mean"] = "token-mean"
    """One exact mean over the mini-batch's tokens; the official code's mean a micro-batch weighted by its sequences; or a mean a
    response (GRPO)."""
    normalize_advantage: bool = True
    """Divide advantages by the group's standard deviation (Dr. GRPO: false)."""
    head_memory_mb: Count = 256
    """MiB for the one [chunk, vocabulary / TP] fp32 buffer of the log-prob and entropy head."""


class Optimizer(Section):
    lr: Positive = 1e-6
    """Peak learning rate."""
    warmup_steps: CountOrZero = 0
    """Optimizer updates over which the rate grows from 0 to `lr`."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up, down to `min_lr` at the last update."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a decay."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay."""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    grad_clip: NonNegative = 1.0
    """Global gradient norm at most this; 0 turns clipping off."""
    overlap: bool = False
    """Reduce gradients during the backward and gather updated weights during the next forward, instead of before and after it."""

    @model_validator(mode="after")
    def _rate_falls(self) -> Optimizer:
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr is {self.min_lr} but optimizer.lr is {self.lr}: a decay ends at it, choose a smaller one")
        return self


class Precision(Section):
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations; with bf16 the optimizer keeps fp32 main weights."""
    rollout_fp8: bool = False
    """vLLM's projections in e4m3, in blocks of 128 x 128 with a scale each, quantised at every refit; embedding, head and norms stay bf16.
    It needs `dtype: bf16` and `loss.importance_cap`."""
    train_fp8: bool = False
    """The trainer's projections multiply in e4m3, forward and backward: activations and gradients in blocks of 1 x 128, weights of
    128 x 128, quantised by Transformer Engine on the way. What is kept stays as it is: weights, gradients, optimizer; and so do embedding,
    head, norms and attention. It needs `dtype: bf16`, Transformer Engine, and a GPU that multiplies such blocks (H100, H200)."""

    @model_validator(mode="after")
    def _fp8_beside_bf16(self) -> Precision:
        for name, user in (("rollout_fp8", "vLLM"), ("train_fp8", "Transformer Engine")):
            if getattr(self, name) and self.dtype != "bf16":
                raise ValueError(f"precision.{name} is true with precision.dtype={self.dtype}: {user} needs bf16 with it; set dtype=bf16")
        return self


class Train(Section):
    steps: Count = 100
    """Steps of the run (sft: optimizer updates)."""
    minibatches: Count = 1
    """Optimizer updates a step; the step's prompts are divided evenly among them."""
    micro_batch_tokens: Count | None = None
    """Tokens packed into a micro-batch at most. Empty: just enough for the longest possible sequence."""


class Checkpoint(Section):
    every: CountOrZero = 0
    """Save every N steps and after the last; 0 saves after the last step only."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    export_hf: bool = True
    """Write the trained model as a Hugging Face folder `hf/` after the last step."""
    background: bool = False
    """Write checkpoints while training goes on, from a copy in host memory; a rank forks a process for it."""


class Eval(Section):
    every: CountOrZero = 0
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
    wandb: str | None = None
    """Project on Weights & Biases for the metrics as well (extra `wandb`; WANDB_MODE=offline keeps them in the run folder). Empty: none."""
    text: bool = False
    """Write log.txt in the run folder: the lines of the terminal, as plain text."""
    rollouts_every: CountOrZero = 1
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
        for key, value in {"precision.rollout_fp8": self.precision.rollout_fp8, "rollout.staleness": self.rollout.staleness}.items():
            if value and self.loss.importance_cap is None:
                raise ValueError(
                    f"{key} is {str(value).lower()} without loss.importance_cap: tokens would count as if the newest weights in full "
                    f"precision had drawn them; set loss.importance_cap=2, or leave {key} out"
                )
        if self.reward.overlong == "shaping" and self.reward.overlong_buffer > self.rollout.max_response_length:
            raise ValueError(
                f"reward.overlong_buffer is {self.reward.overlong_buffer} but rollout.max_response_length is "
                f"{self.rollout.max_response_length}: choose a smaller buffer, or reward.overlong=none"
            )
        if self.train.micro_batch_tokens is not None and self.train.micro_batch_tokens < self.longest_padded:
            raise ValueError(
                f"train.micro_batch_tokens is {self.train.micro_batch_tokens} but one sequence may have {self.longest_padded} tokens "
                "(data.max_prompt_length + rollout.max_response_length, padded for cp and sp): raise it to at least that"
            )
        return self

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.data.max_prompt_length + self.rollout.max_response_length

    @property
    def longest_padded(self) -> int:
        """The same, padded as the layout asks."""
        multiple = self.parallel.sequence_multiple
        return -(-self.longest_sequence // multiple) * multiple

    @property
    def micro_batch_tokens(self) -> int:
        return self.train.micro_batch_tokens or self.longest_padded

    @property
    def micro_batch_padding(self) -> int:
        """To what multiple a packed micro-batch is padded: in FP8 each rank's share of its tokens is whole blocks of 128."""
        return 128 * self.parallel.cp * (self.parallel.tp if self.parallel.sp else 1) if self.precision.train_fp8 else 1

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=140)
