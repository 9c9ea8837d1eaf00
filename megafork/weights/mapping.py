"""The one table of how Hugging Face tensors lie in Megatron's parameters.

Every parameter of a TP rank is a stack of rectangles of Hugging Face tensors (`Piece`). Loading copies the rectangles in, exporting
copies them out, and a resharding plan is the intersection of two such lists; none of them knows a model's names.

Megatron's layouts: the fused QKV holds, per key-value group, its query heads, its key and its value, and is split evenly over TP (also
when there are fewer groups than TP ranks); the gated MLP holds on each rank its share of gate above its share of up; output projections
are split by columns; embedding and head are padded to a multiple of TP and split by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megafork.shape import Shape

Kind = Literal["vocab", "qkv", "gated", "row", "replicated"]


@dataclass(frozen=True)
class Rule:
    """A Megatron parameter name, the Hugging Face tensors in it, and how it is split. `{i}` is the global layer number."""

    megatron: str
    huggingface: tuple[str, ...]
    kind: Kind


_LAYER = "decoder.layers.{i}."
_HF = "model.layers.{i}."
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
LAYER_RULES = (
    Rule(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), "replicated"),
    Rule(_LAYER + "self_attention.linear_qkv.weight", tuple(_HF + name + ".weight" for name in _QKV), "qkv"),
    Rule(_LAYER + "self_attention.linear_qkv.bias", tuple(_HF + name + ".bias" for name in _QKV), "qkv"),
    Rule(_LAYER + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), "replicated"),
    Rule(_LAYER + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), "replicated"),
    Rule(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), "row"),
    Rule(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), "replicated"),
    Rule(_LAYER + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), "gated"),
    Rule(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), "row"),
)
FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated")
HEAD = Rule("output_layer.weight", ("lm_head.weight",), "vocab")
TIED_HEAD = Rule("output_layer.weight", ("model.embed_tokens.weight",), "vocab")


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) and columns [start, stop) of a Hugging Face tensor (columns None: all), at row `at` of a Megatron shard."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    at: int


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model by its global name, with its rule and layer (None outside the layers)."""

    name: str
    rule: Rule
    layer: int | None

    def huggingface(self) -> tuple[str, ...]:
        return tuple(name.format(i=self.layer) for name in self.rule.huggingface)


def parameters(shape: Shape) -> Iterator[Parameter]:
    """Every parameter once, embedding first and head last, layer by layer. A tied head is the embedding and does not occur."""
    yield Parameter(EMBEDDING.megatron, EMBEDDING, None)
    for layer in range(shape.layers):
        for rule in LAYER_RULES:
            if _present(rule, shape):
                yield Parameter(rule.megatron.format(i=layer), rule, layer)
    yield Parameter(FINAL_NORM.megatron, FINAL_NORM, None)
    if not shape.tied:
        yield Parameter(HEAD.megatron, HEAD, None)


def _present(rule: Rule, shape: Shape) -> bool:
    if rule.megatron.endswith("linear_qkv.bias"):
        return shape.qkv_bias
    if "_layernorm" in rule.megatron and ".self_attention." in rule.megatron:
        return shape.qk_norm
    return True


def huggingface_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its full shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(shape):
        for name in parameter.huggingface():
            shapes[name] = full_shape(name, shape)
    return shapes


def full_shape(name: str, shape: Shape) -> tuple[int, ...]:
    """The shape of one Hugging Face tensor."""
    rows = {
        "q_proj": shape.heads * shape.head_dim,
        "k_proj": shape.kv_heads * shape.head_dim,
        "v_proj": shape.kv_heads * shape.head_dim,
        "o_proj": shape.hidden,
        "q_norm": shape.head_dim,
        "k_norm": shape.head_dim,
        "gate_proj": shape.ffn,
        "up_proj": shape.ffn,
        "down_proj": shape.hidden,
        "embed_tokens": shape.vocab,
        "lm_head": shape.vocab,
    }
    columns = {"o_proj": shape.heads * shape.head_dim, "down_proj": shape.ffn}
    module, kind = name.split(".")[-2:]
    if module not in rows:
        return (shape.hidden,)
    if kind == "bias" or module.endswith("norm"):
        return (rows[module],)
    return (rows[module], columns.get(module, shape.hidden))


def shard_shape(parameter: Parameter, shape: Shape, tp: int) -> tuple[int, ...]:
    """Shape of the parameter on one TP rank."""
    fulls = [full_shape(name, shape) for name in parameter.huggingface()]
    rest = fulls[0][1:]
    match parameter.rule.kind:
        case "vocab":
            return (shape.padded_vocab(tp) // tp, *rest)
        case "qkv" | "gated":
            return (sum(full[0] for full in fulls) // tp, *rest)
        case "row":
            return (fulls[0][0], fulls[0][1] // tp)
        case "replicated":
            return fulls[0]


def pieces(parameter: Parameter, shape: Shape, tp: int, rank: int) -> list[Piece]:
    """The rectangles of Hugging Face tensors in TP rank `rank`'s shard, in row order. Rows that no piece covers are vocabulary padding."""
    names = parameter.huggingface()
    rows = shard_shape(parameter, shape, tp)[0]
    match parameter.rule.kind:
        case "vocab":
            start, stop = min(rank * rows, shape.vocab), min((rank + 1) * rows, shape.vocab)
            return [Piece(names[0], (start, stop), None, 0)] if stop > start else []
        case "qkv":
            return _cut(_fused_qkv(names, shape), rank * rows, (rank + 1) * rows)
        case "gated":
            half = rows // 2
            return [Piece(name, (rank * half, (rank + 1) * half), None, n * half) for n, name in enumerate(names)]
        case "row":
            width = shard_shape(parameter, shape, tp)[1]
            return [Piece(names[0], (0, rows), (rank * width, (rank + 1) * width), 0)]
        case "replicated":
            return [Piece(names[0], (0, rows), None, 0)]


def _fused_qkv(names: tuple[str, ...], shape: Shape) -> Iterator[tuple[str, int, int]]:
    """(tensor, first row, rows) of the fused QKV from top to bottom."""
    q, k, v = names
    d = shape.head_dim
    queries = shape.heads // shape.kv_heads * d
    for group in range(shape.kv_heads):
        yield q, group * queries, queries
        yield k, group * d, d
        yield v, group * d, d


def _cut(blocks: Iterator[tuple[str, int, int]], start: int, stop: int) -> list[Piece]:
    """The part of stacked blocks that lies in rows [start, stop) of the stack."""
    cut, top = [], 0
    for name, first, count in blocks:
        low, high = max(top, start), min(top + count, stop)
        if low < high:
            cut.append(Piece(name, (first + low - top, first + high - top), None, low - start))
        top += count
    return cut
