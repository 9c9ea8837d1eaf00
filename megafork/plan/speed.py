"""The time of a step by phase, from FLOPs, bytes and the shares of the peaks in `hardware.py`. All of it is an estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megafork.plan import experts
from megafork.plan.hardware import (
    ALL_REDUCE_LATENCY,
    ATTENTION_SHARE,
    DECODE_SHARE,
    DECODE_STEP,
    EXPERT_SHARE,
    FAR_ALL_REDUCE_LATENCY,
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
from megafork.shape import Shape, stage_of_layer


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

    active = float(engine.weights - engine.experts)
    if shape.moe is not None:
        active += engine.experts * shape.moe.per_token / shape.moe.experts / EXPERT_SHARE

    def decode(batch: float, context: float) -> float:
        read = engine.weights - engine.experts + (engine.experts * experts.touched(shape, batch) / EXPERT_SHARE if engine.experts else 0)
        reading = (read + batch * context * engine.token) / (gpu.bandwidth * DECODE_SHARE)
        counting = batch * active / (gpu.flops * MATMUL_SHARE)  # 2 FLOP per weight of 2 bytes
        latency = FAR_ALL_REDUCE_LATENCY if spec.tp > GPUS_PER_NODE else ALL_REDUCE_LATENCY
        joining = 2 * shape.layers * latency if spec.tp > 1 else 0.0
        return max(reading, counting) + joining + DECODE_STEP

    bulk = sampled * load.response / running * decode(running, context)
    alone = max(spec.max_response_length - load.response, 0.0) * decode(1, spec.max_response_length)
    prefill = sampled * load.prompt * active / (gpu.flops * MATMUL_SHARE)
    return bulk + rounds * alone + prefill, running


def _micro_batches(recipe: Recipe, load: Load, sequences: float) -> int:
    """Micro-batches that hold these sequences, packed as full as whole sequences allow."""
    fitting = max(1.0, recipe.micro_batch_tokens // load.length)
    multiple = recipe.parallel.micro_batch_multiple
    return max(1, math.ceil(sequences / fitting / multiple)) * multiple


@dataclass(frozen=True)
class Work:
    """A pass over one micro-batch. `linear`: the layers' matmuls in units of one forward. `moves`: passes that communicate."""

    local: float
    """Tokens of a CP rank."""
    length: float
    """Of a sequence."""
    linear: float
    moves: float


def _pass(shape: Shape, recipe: Recipe, gpu: Gpu, load: Load, micro_batches: int, *, linear: float, head: float, moves: float) -> float:
    """Seconds of one schedule over the micro-batches: the slowest stage, plus the time in which the pipeline fills and drains.

    `linear` and `moves`: as in `Work`. `head`: as `linear`, for the head at all response positions.
    """
    layout = recipe.parallel
    tokens = min(recipe.micro_batch_tokens // load.length, load.samples) * load.length
    work = Work(max(tokens, load.length) / layout.cp, load.length, linear, moves)
    seconds = {kind: _layer(shape, recipe, gpu, work, sparse=kind) for kind in {shape.is_sparse(layer) for layer in range(shape.layers)}}
    rows = work.local * load.response / load.length
    stages = [0.0] * layout.pp
    stages[-1] = head * rows * 2 * shape.hidden * shape.vocab / layout.tp / (gpu.flops * MATMUL_SHARE)
    for number, stage in enumerate(stage_of_layer(shape.layers, layout)):
        stages[stage] += seconds[shape.is_sparse(number)]
    return (micro_batches + (layout.pp - 1) / layout.vpp) * max(stages)


def _layer(shape: Shape, recipe: Recipe, gpu: Gpu, work: Work, *, sparse: bool) -> float:
    """Seconds of one layer: its arithmetic, what plain layers move beyond fused ones, and what its ranks send each other."""
    layout, width, local = recipe.parallel, WIDTH[recipe.precision.dtype], work.local
    of_mlp = 2 * experts.weights_of_a_token(shape, layout) / EXPERT_SHARE if sparse else 2 * 3 * shape.hidden * shape.ffn
    matmul = 2 * shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + of_mlp
    again = work.linear > 1 and recipe.model.recompute == "selective"  # only the attention core
    attention = 2 * work.length * shape.heads * shape.head_dim
    share = MATMUL_SHARE * (FP8_GAIN if recipe.precision.train_fp8 else 1.0)
    compute = local / layout.tp / gpu.flops * (work.linear * matmul / share + (work.linear + again) * attention / ATTENTION_SHARE)
    backward = work.linear > 1  # twice a forward, beside one forward or, with recomputation, two
    more = more_than_fused(shape, recipe, sparse=sparse)
    plain = more.seconds(gpu, local, forwards=work.linear - 2 * backward, backwards=float(backward))
    reductions = 1 if sparse else 2  # over TP: attention's and the MLP's
    ring = reductions * 2 * (layout.tp - 1) / layout.tp * shape.hidden * width
    gather = (layout.cp - 1) * 2 * max(shape.kv_heads / layout.tp, 1) * shape.head_dim * width
    talk = local * (ring / _link(layout.tp > GPUS_PER_NODE, gpu) + gather / _link(layout.tp * layout.cp > GPUS_PER_NODE, gpu))
    if sparse:
        talk += local * experts.traffic(shape, layout, width).seconds(gpu, LINK_SHARE)
    return compute + plain + work.moves * talk


def _synchronise(recipe: Recipe, gpus: int, gpu: Gpu, weights: Weights) -> float:
    """Seconds to reduce the gradients, step the optimizer and gather the weights; with `optimizer.overlap` only the step counts."""
    speed = _link(gpus // recipe.parallel.pp > GPUS_PER_NODE, gpu)
    width = 4 + WIDTH[recipe.precision.dtype]
    moved = sum(kind.elements * width * (kind.shards - 1) / kind.shards for kind in weights.kinds) / speed
    stepped = 3 * max(weights.optimizer_bytes) / gpu.bandwidth  # read, write, and the gradients
    return stepped + (0.0 if recipe.optimizer.overlap else moved)


def _link(leaves_the_node: bool, gpu: Gpu) -> float:
    return (NETWORK if leaves_the_node else gpu.link) * LINK_SHARE
