"""A GPU's memory during a step: the trainer's state, activations, vLLM, and the refit buffer between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from megafork.model.fp8 import BLOCK
from megafork.plan.activations import Activations, stage_activations
from megafork.plan.hardware import FRAGMENTS, GPUS_PER_NODE, RESERVED, VLLM_ASLEEP, VLLM_OVERHEAD, Gpu
from megafork.plan.layers import layers_of
from megafork.plan.parameters import WIDTH, Weights, chunk_layers, layer_parameters, over_model, stage_weights
from megafork.recipe import Recipe
from megafork.shape import Rule, Shape, Span, stage_layers
from megafork.weights.mapping import Parameter, shard_shape
from megafork.weights.reshard import needed

_CACHE_WIDTH = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of a number in vLLM's KV cache by `rollout.engine.kv_cache_dtype`. Others count as the model's own."""


@dataclass(frozen=True)
class Engine:
    """A rank's part of a vLLM engine, in bytes."""

    weights: int
    cache: int
    """KV cache; a negative value is the shortfall before there is any cache."""
    token: int
    """KV cache of one token."""
    longest: int
    """Tokens of the longest prompt and response."""
    experts: int
    """Of the weights, those of experts."""
    pool: int
    """Total that vLLM uses while it is awake."""

    @property
    def concurrent(self) -> int:
        """Responses of full length that the engine holds at once."""
        return max(self.cache, 0) // (self.token * self.longest)


@dataclass(frozen=True)
class StageMemory:
    """Memory of one rank of a pipeline stage, in bytes; its ranks differ only in padding."""

    stage: int
    layers: int
    weights: Weights
    activations: Activations
    engine: Engine
    fp8_copies: int
    """FP8 copies of the projections that Transformer Engine keeps: one for the forward and one, transposed, for the backward."""
    refit_buffer: int
    colocated: bool
    """Whether vLLM shares the GPU; otherwise it runs on servers with their own GPUs."""
    parked: bool
    """Whether gradients and optimizer are off the GPU while vLLM is awake."""

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer, which are always allocated. Exact."""
        return self.weights.weight_bytes + self.weights.gradient_bytes + max(self.weights.optimizer_bytes)

    @property
    def phases(self) -> dict[str, int]:
        """Total bytes in each phase of a step. Estimates: only `state` and vLLM's weights are exact."""
        always = self.state + self.fp8_copies + RESERVED
        awake, asleep = (self.engine.pool, VLLM_ASLEEP) if self.colocated else (0, 0)
        training = max(math.ceil(self.activations.total * (1 + FRAGMENTS)), self.weights.step_bytes)
        outside_update = always - (self.state - self.weights.weight_bytes if self.parked else 0)
        return {
            "rollout": outside_update + awake,
            "update": always + asleep + training,
            "refit": outside_update + awake + self.refit_buffer,
        }


def stages(shape: Shape, recipe: Recipe, gpus: int, gpu: Gpu) -> list[StageMemory]:
    """Memory of each pipeline stage at the longest micro-batch, with the head run at every position."""
    engine = engine_memory(shape, recipe, gpu)
    buffer = refit_buffer(shape, recipe, gpus)
    micro_batches = 10**9  # enough to fill the pipeline
    whole = recipe.micro_batch_padding
    tokens = -(-recipe.micro_batch_tokens // whole) * whole
    colocated, parked = not recipe.rollout.servers, recipe.rollout.park_training
    result = []
    for stage, layers in enumerate(stage_layers(shape.layers, recipe.parallel)):
        counts = {"tokens": tokens, "micro_batches": micro_batches, "head_rows": tokens}
        activations = stage_activations(shape, recipe, stage, **counts, layers=layers_of(recipe))
        weights = stage_weights(shape, recipe, stage, gpus)
        copies = _fp8_copies(shape, recipe, stage)
        result.append(StageMemory(stage, layers, weights, activations, engine, copies, buffer, colocated, parked))
    return result


def _fp8_copies(shape: Shape, recipe: Recipe, stage: int) -> int:
    """Bytes of the two FP8 copies of a rank's projections, including an fp32 scale per block."""
    if not recipe.precision.train_fp8:
        return 0
    family, layout = shape.family, recipe.parallel

    def copies(rules: Iterable[Rule], parts: int) -> int:
        sizes = (math.prod(shard_shape(Parameter(family, rule), shape, parts)) for rule in rules if rule.fp8)
        return sum(2 * (size + 4 * size // BLOCK**2) for size in sizes)

    own = shape.moe.experts // layout.ep if shape.moe is not None else 0
    of_layer = {
        False: copies(family.layer, layout.tp),
        True: copies(family.sparse_layer, layout.tp) + own * copies(family.experts, layout.expert_tp),
    }
    chunks = (chunk_layers(shape, layout, stage, chunk) for chunk in range(layout.vpp))
    return sum(of_layer[shape.is_sparse(layer)] for layer in itertools.chain.from_iterable(chunks))


def engines(recipe: Recipe, gpus: int) -> int:
    """Number of vLLM engines that share a roll-out when training on `gpus` GPUs."""
    return len(recipe.rollout.servers) or gpus // recipe.rollout.tp


def engine_memory(shape: Shape, recipe: Recipe, gpu: Gpu) -> Engine:
    """vLLM's weights (exact: the parts that it loads) and the memory left for its KV cache."""
    width, tp = WIDTH[recipe.precision.dtype], recipe.rollout.tp
    how = {"fp8": recipe.precision.rollout_fp8, "whole": recipe.rollout.whole_experts}
    others, experts = (_engine_bytes(shape, tp, width, experts=which, **how) for which in (False, True))
    weights = others + experts
    if recipe.rollout.kv_cache_mb is not None:
        cache = recipe.rollout.kv_cache_mb * 2**20
        pool = weights + cache + VLLM_OVERHEAD
    else:
        pool = int(gpu.memory * recipe.rollout.gpu_memory_fraction)
        cache = pool - weights - VLLM_OVERHEAD
    kept = _CACHE_WIDTH.get(str(recipe.rollout.engine.get("kv_cache_dtype")), width)
    token = 2 * shape.layers * max(shape.kv_heads // tp, 1) * shape.head_dim * kept
    return Engine(weights, cache, token, recipe.longest_sequence, experts, pool)


def refit_buffer(shape: Shape, recipe: Recipe, gpus: int) -> int:
    """Most bytes that a rank needs for a refit's bucket in transit (`weights/refit.py`): its whole tensors, and the parts that the rank
    sends and receives in a round. An upper bound, norms apart, and at most twice what the transfers need."""
    layout = recipe.parallel
    others = _moved(layout.tp, layout.tp, recipe, gpus)
    experts = _moved(layout.ep * layout.expert_tp, layout.expert_tp, recipe, gpus)
    buckets = [(1 + others) * shape.vocab * shape.hidden]
    for sparse in {shape.is_sparse(layer) for layer in range(shape.layers)}:
        buckets.append((1 + (max(others, experts) if sparse else others)) * sum(layer_parameters(shape, sparse=sparse)))
    return math.ceil(WIDTH[recipe.precision.dtype] * max(buckets))


def _moved(every: int, parts: int, recipe: Recipe, gpus: int) -> float:
    """Upper bound for what a rank sends and receives in a round, as a share of parameters that `every` ranks hold together, each of them
    in `parts` shards. Follows the choice of senders in `weights/reshard.py`."""
    engine, per_stage = recipe.rollout.tp, gpus // recipe.parallel.pp
    if per_stage == gpus and every == 1:
        return 0.0  # each rank holds everything
    node = min(gpus, GPUS_PER_NODE)
    # to ranks of the same node: holders of a shard take turns at every `every` consecutive ranks
    turns = -(-node // min(node, per_stage))
    near = turns * min(-(-every // engine) / every, every / engine, 1)
    # to nodes that hold nothing of it, once each: holders of a shard take turns at the nodes
    nodes, holding = -(-gpus // node), -(-per_stage // node)
    far = -(-(nodes - holding) * every // per_stage) / every
    # in the second round, on such a node: ranks that load the same take turns at passing on a shard to the others
    engines = max(node // engine, 1)
    shards = -(-max(parts // engine, 1) // engines)
    relayed = (engines - 1) * shards / max(parts, engine) if nodes > holding else 0
    return 1 / engine + max(near + far, relayed)


def _engine_bytes(shape: Shape, tp: int, width: int, *, fp8: bool, experts: bool, whole: bool) -> int:
    """Bytes of the weights that an engine's rank loads: those of experts, or all others."""

    def size(parameter: Parameter) -> int:
        if (parameter.expert is not None) != experts:
            return 0
        parts = itertools.chain.from_iterable(needed(name, shape, tp, 0, whole_experts=whole) for name in parameter.huggingface())
        return sum(part(*each, fp8=fp8 and parameter.rule.fp8) for each in parts)

    def part(rows: Span, columns: Span | None, *, fp8: bool) -> int:
        high, wide = rows[1] - rows[0], columns[1] - columns[0] if columns else 1
        return high * wide + 4 * -(-high // BLOCK) * -(-wide // BLOCK) if fp8 else high * wide * width

    return over_model(shape, size)
