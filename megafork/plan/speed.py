"""The time of a step by phase, from FLOPs, bytes and the shares of the peaks in `hardware.py`. All of it is an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megafork.plan.hardware import (
    ALL_REDUCE_LATENCY,
    ATTENTION_SHARE,
    DECODE_SHARE,
    DECODE_STEP,
    FP8_GAIN,
    GPUS_PER_NODE,
    GROUPS_SAMPLED,
    HOST,
    LINK_SHARE,
    MATMUL_SHARE,
    NETWORK,
    PROMPT_SHARE,
    RESPONSE_SHARE,
    Gpu,
)
from megafork.plan.layers import more_than_fused
from megafork.plan.memory import Engine, engines
from megafork.plan.parameters import WIDTH, Weights
from megafork.recipe import Recipe
from megafork.shape import Shape, stage_layers


@dataclass(frozen=True)
class Step:
    """Seconds of each phase of a step."""

    rollout: float
    score: float
    update: float
    refit: float
    prompt: float
    """Mean tokens, assumed."""
    response: float
    """Mean tokens, assumed or given."""
    tokens: int
    """Prompt and response tokens that are trained on."""
    gpus: int
    """GPUs, including those of roll-out servers."""
    running: int
    """Responses that an engine decodes at once."""
    micro_batches: int
    """Micro-batches per DP rank in one optimizer update."""
    ahead: bool = False
    """Whether the next step's roll-out runs while this step trains."""

    @property
    def seconds(self) -> float:
        training = self.score + self.update + self.refit
        return max(self.rollout, training) if self.ahead else self.rollout + training

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.seconds / self.gpus


@dataclass(frozen=True)
class Load:
    """The work in a step, from the recipe and the assumed mean lengths."""

    prompt: float
    response: float
    samples: int

    @property
    def length(self) -> float:
        return self.prompt + self.response

    @classmethod
    def of(cls, recipe: Recipe, mean_response: int | None) -> Load:
        spec = recipe.rollout
        response = mean_response or RESPONSE_SHARE * spec.max_response_length
        return cls(PROMPT_SHARE * recipe.data.max_prompt_length, response, spec.prompts * spec.samples)


def step_time(
    shape: Shape, recipe: Recipe, gpus: int, gpu: Gpu, engine: Engine, weights: list[Weights], mean_response: int | None = None
) -> Step:
    """Time of one step on `gpus` GPUs. `mean_response`: tokens; None: an assumed share of the maximum."""
    load = Load.of(recipe, mean_response)
    rollout, running = _rollout(shape, recipe, gpus, gpu, engine, load)
    spec, layout = recipe.forks, recipe.parallel
    dp = gpus // layout.model_size
    micro_batches = _micro_batches(recipe, load, load.samples / recipe.train.minibatches / dp)
    every = _pass(shape, recipe, gpu, load, _micro_batches(recipe, load, load.samples / dp), linear=1, head=1.0, moves=1)
    chosen = spec.share_with_loss
    again = recipe.model.recompute == "full"
    # forward 1, backward 2, recomputation 1; the head recomputes its logits in the backward: 4 times its forward in total
    one = _pass(shape, recipe, gpu, load, micro_batches, linear=3 + again, head=4 * chosen, moves=2 + again)
    update = recipe.train.minibatches * (one + max(_synchronise(recipe, gpus, gpu, w) for w in weights))
    # the few responses compared otherwise do not count
    score = every * (recipe.scores_everything + (spec.entropy_from == "current") + recipe.loss.kl.kept)
    parked = 2 * max(max(w.optimizer_bytes) for w in weights) / HOST if recipe.rollout.park_training else 0.0
    refit = engine.weights / _link(gpus > GPUS_PER_NODE, gpu) + parked
    tokens, ahead = int(load.samples * load.length), recipe.rollout.staleness > 0
    every_gpu = gpus + len(recipe.rollout.servers) * recipe.rollout.tp
    return Step(rollout, score, update, refit, load.prompt, load.response, tokens, every_gpu, running, micro_batches, ahead)


def _rollout(shape: Shape, recipe: Recipe, gpus: int, gpu: Gpu, engine: Engine, load: Load) -> tuple[float, int]:
    """Seconds, and responses decoded at once: most at full batch, then the longest responses nearly alone, once per round."""
    spec = recipe.rollout
    rounds = 2 if spec.dynamic_sampling and spec.max_refills else 1
    sampled = load.samples * (GROUPS_SAMPLED if rounds > 1 else 1.0) / engines(recipe, gpus)
    context = load.prompt + load.response / 2
    room = max(engine.cache, 0) / (engine.token * context)
    running = max(1, int(min(spec.max_running, room, sampled)))

    def decode(batch: float, context: float) -> float:
        reading = (engine.weights + batch * context * engine.token) / (gpu.bandwidth * DECODE_SHARE)
        counting = batch * engine.weights / (gpu.flops * MATMUL_SHARE)  # 2 FLOP per weight of 2 bytes
        joining = 2 * shape.layers * ALL_REDUCE_LATENCY if spec.tp > 1 else 0.0
        return max(reading, counting) + joining + DECODE_STEP

    bulk = sampled * load.response / running * decode(running, context)
    alone = max(spec.max_response_length - load.response, 0.0) * decode(1, spec.max_response_length)
    prefill = sampled * load.prompt * engine.weights / (gpu.flops * MATMUL_SHARE)
    return bulk + rounds * alone + prefill, running


def _micro_batches(recipe: Recipe, load: Load, sequences: float) -> int:
    """Micro-batches that hold these sequences, packed as full as whole sequences allow."""
    fitting = max(1.0, recipe.micro_batch_tokens // load.length)
    multiple = recipe.parallel.micro_batch_multiple
    return max(1, math.ceil(sequences / fitting / multiple)) * multiple


def _pass(shape: Shape, recipe: Recipe, gpu: Gpu, load: Load, micro_batches: int, *, linear: float, head: float, moves: float) -> float:
    """Seconds of one schedule over the micro-batches: the slowest stage, plus the time in which the pipeline fills and drains.

    `linear`: the layers' matmuls in units of one forward. `head`: the same for the head at all response positions. `moves`: passes that
    communicate over TP and CP.
    """
    layout, width = recipe.parallel, WIDTH[recipe.precision.dtype]
    tokens = min(recipe.micro_batch_tokens // load.length, load.samples) * load.length
    local = max(tokens, load.length) / layout.cp
    matmul = 2 * (shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 3 * shape.hidden * shape.ffn)
    again = linear > 1 and recipe.model.recompute == "selective"  # only the attention core
    attention = 2 * load.length * shape.heads * shape.head_dim
    share = MATMUL_SHARE * (FP8_GAIN if recipe.precision.train_fp8 else 1.0)
    compute = local / layout.tp / gpu.flops * (linear * matmul / share + (linear + again) * attention / ATTENTION_SHARE)
    backward = linear > 1  # twice a forward, beside one forward or, with recomputation, two
    traffic = more_than_fused(shape, recipe).seconds(gpu, local, forwards=linear - 2 * backward, backwards=float(backward))
    ring = 2 * 2 * (layout.tp - 1) / layout.tp * shape.hidden * width  # two all-reduces per layer
    gather = (layout.cp - 1) * 2 * max(shape.kv_heads / layout.tp, 1) * shape.head_dim * width
    talk = moves * local * (ring / _link(layout.tp > GPUS_PER_NODE, gpu) + gather / _link(layout.tp * layout.cp > GPUS_PER_NODE, gpu))
    rows = local * load.response / load.length
    at_head = head * rows * 2 * shape.hidden * shape.vocab / layout.tp / (gpu.flops * MATMUL_SHARE)
    counts = stage_layers(shape.layers, layout)
    slowest = max(n * (compute + traffic + talk) + (at_head if stage == layout.pp - 1 else 0.0) for stage, n in enumerate(counts))
    return (micro_batches + (layout.pp - 1) / layout.vpp) * slowest


def _synchronise(recipe: Recipe, gpus: int, gpu: Gpu, weights: Weights) -> float:
    """Seconds to reduce the gradients, step the optimizer and gather the weights; with `optimizer.overlap` only the step counts."""
    speed = _link(gpus // recipe.parallel.pp > GPUS_PER_NODE, gpu)
    share = (weights.shards - 1) / weights.shards
    moved = 0.0 if recipe.optimizer.overlap else share * (weights.gradient_bytes + weights.weight_bytes) / speed
    return moved + 3 * max(weights.optimizer_bytes) / gpu.bandwidth  # read, write, and the gradients


def _link(leaves_the_node: bool, gpu: Gpu) -> float:
    return (NETWORK if leaves_the_node else gpu.link) * LINK_SHARE
