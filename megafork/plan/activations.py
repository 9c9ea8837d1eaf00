"""Activation memory of a rank: closed forms of the tensors that our model's autograd graph saves.

Derived from the model in `model/build.py`. Those of plain layers on the CPU (norms in fp32, attention by PyTorch) are checked against the
allocations of a run; on a GPU norms keep no fp32 copy, SwiGLU keeps only its input and attention is one call, and fused layers also keep
less of rotary positions. With context parallelism they assume attention that keeps no score matrix, as on a GPU. `experts.py` has what
differs in layers with experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megafork.plan import experts
from megafork.plan.layers import Layers
from megafork.plan.parameters import WIDTH, chunk_layers
from megafork.recipe import Recipe
from megafork.shape import Shape


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer keeps per token of a rank, by part of the layer, and the layer's input."""

    norms: float
    """The two norms of the residual stream: fp32 copy, normed and scaled."""
    attention: float
    """Fused QKV, the norms of q and k, RoPE, the core's inputs and output."""
    mlp: float
    """Fused gate and up, and their product; on the CPU also silu, and up again. Or what the router, the dispatcher and the experts keep."""
    input: float
    """The residual stream alone: all that full recomputation keeps."""

    @property
    def total(self) -> float:
        return self.norms + self.attention + self.mlp


def layer(shape: Shape, recipe: Recipe, layers: Layers, *, sparse: bool = False, skew: float = 1.0) -> Layer:
    """Bytes per token for `model.recompute` none or selective; under full, layers keep only `input`, and one at a time needs `total`.

    `sparse`: a layer with experts. `skew`: copies of tokens that the rank gets, as a multiple of the mean."""
    one = _layer_on_cpu(shape, recipe) if layers == "cpu" else _layer_on_gpu(shape, recipe, fused=layers == "fused")
    if not sparse:
        return one
    how = {"fused": layers == "fused", "on_cpu": layers == "cpu"}
    return replace(one, mlp=experts.kept(shape, recipe.parallel, WIDTH[recipe.precision.dtype], skew, **how))


def _layer_on_gpu(shape: Shape, recipe: Recipe, *, fused: bool) -> Layer:
    layout, width = recipe.parallel, WIDTH[recipe.precision.dtype]
    d, ffn = shape.head_dim, shape.ffn / layout.tp
    q, kv = shape.heads / layout.tp * d, max(shape.kv_heads / layout.tp, 1) * d
    mixed = q + 2 * kv if shape.kv_heads >= layout.tp else (shape.heads + 2 * shape.kv_heads) * d  # Megatron then gathers it
    stream = width * shape.hidden / (layout.tp if layout.sp else 1)
    gathered = layout.cp > 1 and not fused  # fused layers exchange keys and values while they compute
    again = recipe.model.recompute == "selective"
    copied = q + kv if fused else q if shape.kv_heads > layout.tp else 0.0  # by Transformer Engine; by Megatron, to join groups' queries
    qk_norms = width * copied + 4 * (q + kv) / d if shape.family.qk_norm else 0.0
    angles = 0.0 if fused else 4 * d * width
    core = width * (q + (2 * kv * (layout.cp + 0.5) if gathered else kv)) + (0.0 if again else 4 * q / d)
    return Layer(
        norms=2 * (2 * stream + 4),
        attention=width * mixed + qk_norms + angles + core + width * q,
        mlp=3 * width * ffn,
        input=stream,
    )


def _layer_on_cpu(shape: Shape, recipe: Recipe) -> Layer:
    layout, width = recipe.parallel, WIDTH[recipe.precision.dtype]
    split = layout.tp if layout.sp else 1
    d = shape.head_dim
    heads, groups = shape.heads / layout.tp, max(shape.kv_heads / layout.tp, 1)
    q, kv = heads * d, groups * d
    mixed = q + 2 * kv if shape.kv_heads >= layout.tp else (shape.heads + 2 * shape.kv_heads) * d  # Megatron then gathers it
    half = width == 2
    norms = 2 * (4 + 2 * width) * shape.hidden / split + 8
    qk_norms = (4 + width) * q + (4 * half + width) * kv + 4 * (heads + groups) if shape.family.qk_norm else 0.0
    rope = 4 * d * width
    gathered = layout.cp > 1
    core = width * (q + 2 * kv * layout.cp if gathered else q + kv)
    kept_qkv = 0.0 if gathered and half else width * mixed
    output = width * q  # input of the output projection
    core_output = 0.0 if recipe.model.recompute == "selective" else width * q + 4 * heads
    return Layer(
        norms=norms,
        attention=qk_norms + rope + core + kept_qkv + output + core_output,
        mlp=5 * width * shape.ffn / layout.tp,
        input=width * shape.hidden / split,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes on a rank of one pipeline stage at its peak."""

    in_flight: float
    """Micro-batches whose backward is still to come; with vpp each chunk's counts separately."""
    kept: float
    """Kept by the micro-batches in flight."""
    working: float
    """Needed on top at the peak of one backward: gradients of an MLP, a norm or the head, a recomputed layer."""
    head: float
    """On the last stage: the head's rows, their gradient and its chunk of logits; part of `working`, which is never smaller."""
    gather: float
    """Sequence parallelism's buffer for the whole sequence."""
    routing: float
    """What the dispatchers of layers with experts hold between forwards."""

    @property
    def total(self) -> float:
        return self.kept + self.working + self.gather + self.routing


def micro_batches_in_flight(recipe: Recipe, stage: int, micro_batches: int) -> int:
    """Forwards that a stage has done when its first backward starts, under Megatron's 1F1B or interleaved schedule."""
    layout = recipe.parallel
    if layout.vpp == 1:
        return min(layout.pp - stage, micro_batches)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, micro_batches * layout.vpp)


def stage_activations(
    shape: Shape,
    recipe: Recipe,
    stage: int,
    *,
    tokens: int,
    micro_batches: int,
    head_rows: int,
    layers: Layers,
    skew: float | None = None,
) -> Activations:
    """Activation memory for micro-batches of `tokens` (over all CP ranks) in which the head runs at `head_rows` positions. `skew`: as in
    `layer`; None: as assumed."""
    layout = recipe.parallel
    skew = experts.skew(layout) if skew is None else skew
    local = tokens / layout.cp
    kinds = [shape.is_sparse(n) for chunk in range(layout.vpp) for n in chunk_layers(shape, layout, stage, chunk)]
    layer_of = {sparse: layer(shape, recipe, layers, sparse=sparse, skew=skew) for sparse in set(kinds)}
    one = layer_of[kinds[-1]]
    of_layers = sum(layer_of[sparse].input if recipe.model.recompute == "full" else layer_of[sparse].total for sparse in kinds)
    ends = 0 if layout.pp == 1 else 1 if layout.vpp == 1 else 2  # the stage's input, and its output
    in_flight = micro_batches_in_flight(recipe, stage, micro_batches)
    last = stage == layout.pp - 1
    head = _head_bytes(shape, recipe, head_rows / layout.cp) if last else 0.0
    working = max(
        _in_sparse_layer(shape, recipe, each, local, skew) if sparse else _in_layer(shape, recipe, each, local, on_cpu=layers == "cpu")
        for sparse, each in layer_of.items()
    )
    if last:
        wide = 4 * one.input / WIDTH[recipe.precision.dtype] * local  # the residual stream in fp32
        final_norm = (6 * wide if layers == "cpu" else 2 * one.input * local) + (one.input * local if layout.pp > 1 else 0.0)
        working = max(working, final_norm, head + wide + 2 * one.input * local)
    whole = _whole_sequence(shape, recipe, local)
    kept = in_flight * (of_layers / layout.vpp + ends * one.input) * local
    routing = sum(kinds) * experts.held(shape, layout, fused=layers == "fused") * local if any(kinds) else 0.0
    return Activations(in_flight, kept, working, head, whole, routing)


def _in_layer(shape: Shape, recipe: Recipe, one: Layer, local: float, *, on_cpu: bool) -> float:
    """Bytes needed at the peak of a layer's backward, on top of what all layers keep."""
    tp, width = recipe.parallel.tp, WIDTH[recipe.precision.dtype]
    stream = one.input * local
    product, weight = (
        width * shape.ffn / tp * local,
        width * shape.hidden * shape.ffn / tp,
    )  # of the MLP: inner size, down projection
    whole = _whole_sequence(shape, recipe, local)
    moments = {  # allocated by the backward up to then, less what it has freed
        "down projection": product + whole + weight,
        "silu": 2 * product,
        "gate and up": max(whole, stream) + 2 * weight - product,
        "norm": 5 * 4 / width * stream - one.mlp * local - 2 * stream if on_cpu else 0.0,
    }
    recomputed = one.total * local + stream if recipe.model.recompute == "full" else 0.0
    return recomputed + max(moments.values()) + stream


def _in_sparse_layer(shape: Shape, recipe: Recipe, one: Layer, local: float, skew: float) -> float:
    """Bytes needed at the peak of a layer with experts, on top of what all layers keep."""
    stream = one.input * local
    recomputed = one.total * local + stream if recipe.model.recompute == "full" else 0.0
    return recomputed + experts.working(shape, recipe.parallel, WIDTH[recipe.precision.dtype], skew) * local + stream


def _whole_sequence(shape: Shape, recipe: Recipe, local: float) -> float:
    """Bytes of the residual stream of all TP ranks, which sequence parallelism gathers before each matmul."""
    return WIDTH[recipe.precision.dtype] * shape.hidden * local if recipe.parallel.sp else 0.0


_BLOCK_ROWS = 4096
"""Most rows of a block of the head on a GPU (`parallel/vocab.py`)."""


def _head_bytes(shape: Shape, recipe: Recipe, rows: float) -> float:
    """Bytes of the rows, their gradient, a block's gradient in fp32, and the logits: `loss.head_memory_mb`, or all rows' if less."""
    logits = min(recipe.loss.head_memory_mb * 2**20, 4 * rows * shape.padded_vocab(recipe.parallel.tp) / recipe.parallel.tp)
    return 2 * WIDTH[recipe.precision.dtype] * rows * shape.hidden + 4 * min(rows, _BLOCK_ROWS) * shape.hidden + logits
