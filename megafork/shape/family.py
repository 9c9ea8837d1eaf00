"""Declares a model family: how its tensors are named and split in files, in Megatron and in vLLM. `families.py` holds the table.

Nothing else in the package knows tensor names: loading, export, conversion, the refit, FP8 and the planner read these declarations. Does
not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from megafork.shape.model import Shape

Span = tuple[int, int]
"""Index of the first element, and one past the last."""
Kind = Literal["vocab", "qkv", "gated", "row", "replicated"]
"""How Megatron splits a parameter over its TP ranks; `weights/mapping.py` defines each kind."""
_VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM pads embedding and head to a multiple of this before splitting them."""


@dataclass(frozen=True)
class Axis:
    """Related rows or columns of Hugging Face tensors, such as the queries of all heads."""

    name: str
    """Name used in error messages."""
    size: Callable[[Shape], int]
    split: Literal["whole", "evenly", "by KV head", "padded"] = "whole"
    """What each rank of a vLLM engine loads: everything, an equal part, its KV heads (ranks share a head if there are more ranks than
    heads), or an equal part after padding to a multiple of 64."""

    def part(self, shape: Shape, tp: int, rank: int) -> Span:
        """The part that rank `rank` of an engine of `tp` ranks loads."""
        size = self.size(shape)
        match self.split:
            case "whole":
                return 0, size
            case "evenly":
                return _share(size, tp, rank)
            case "by KV head":
                parts = min(tp, shape.kv_heads)
                return _share(size, parts, rank * parts // tp)
            case "padded":
                start, stop = _share(-(-size // _VLLM_VOCABULARY_MULTIPLE) * _VLLM_VOCABULARY_MULTIPLE, tp, rank)
                return min(start, size), min(stop, size)


@dataclass(frozen=True)
class HFTensor:
    """A tensor in the Hugging Face files."""

    name: str
    """Full name or, for a layer's tensor, the part after the layer's number; `*` stands for an expert's number."""
    rows: tuple[Axis, ...]
    """Axes from top to bottom; several if the files fuse parts that Megatron or vLLM splits, such as queries, keys and values."""
    columns: Axis | None = None
    """None if the tensor is one-dimensional."""

    @property
    def module(self) -> str:
        """The last component of its module's name."""
        return self.name.split(".")[-2]

    def size(self, shape: Shape) -> tuple[int, ...]:
        rows = sum(axis.size(shape) for axis in self.rows)
        return (rows, self.columns.size(shape)) if self.columns else (rows,)


@dataclass(frozen=True)
class Rule:
    """A parameter of Megatron's model and the Hugging Face tensors in it."""

    megatron: str
    """Its name in Megatron's unfused layers; for a layer's parameter, the part after the layer's number. `*` stands for an expert's
    number."""
    kind: Kind
    tensors: tuple[HFTensor, ...]
    """In Megatron's order: the rows of the tensors, concatenated, must be queries, keys, values for `qkv`, and gate, up for `gated`."""
    fused: str | None = None
    """Its name if Transformer Engine fuses it with the following linear, which is also its key in Megatron's checkpoints, or multiplies it
    together with those of other experts; None if the name stays the same."""
    norm: bool = False
    """Whether this is the weight of an RMS norm."""
    fp8: bool = False
    """Whether this is the weight of a projection: FP8 quantises only these, and Megatron stores an extra state beside each."""

    @property
    def module(self) -> str:
        """Megatron's name for the module that it belongs to."""
        return self.megatron.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Family:
    """The computation and tensors of one architecture's models, and transformers' defaults for keys missing from config.json.

    Every family has pre-norm layers with RMS norms, rotary positions, SiLU, a gated MLP, and no biases except those among its parameters.
    """

    model_type: str
    models: str
    """Published models of this family that megafork trains, as the documentation lists them."""
    embedding: Rule
    layer: tuple[Rule, ...]
    """Parameters of each layer, in the order in which Megatron's modules register them; of a mixture of experts, those of a layer without
    experts."""
    final_norm: Rule
    head: Rule
    """The head when config.json does not tie it to the embedding."""
    positions: int
    """Default of max_position_embeddings."""
    sparse_layer: tuple[Rule, ...] = ()
    """Parameters of each layer with experts that all experts share."""
    experts: tuple[Rule, ...] = ()
    """Parameters of each expert, which follow those of its layer. Empty: the models are dense."""
    layers: str = "model.layers"
    """The Hugging Face module that holds the numbered layers."""
    kv_heads: int | None = None
    """Default of num_key_value_heads; None: the number of attention heads."""
    head_dim: int | None = None
    """Default of head_dim; None: hidden_size / num_attention_heads."""
    nulls: tuple[str, ...] = ("num_key_value_heads", "partial_rotary_factor")
    """Keys for which transformers accepts null; a null num_key_value_heads means the number of heads, whatever `kv_heads` is."""
    whole_heads: bool = False
    """Whether hidden_size must be a multiple of num_attention_heads even if head_dim is given."""
    norm_eps: float = 1e-6
    """Default of rms_norm_eps."""
    window: Literal["off", "refused", "on"] = "refused"
    """Effect of `sliding_window`. off: none (another key, which is refused, turns it on); refused: differs between vLLM and transformers;
    on: narrows attention in both, so it is accepted only if it covers all positions."""
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    ropes: tuple[str, ...] = ("default", "llama3", "yarn")
    """Types of rotary positions that transformers and megafork interpret alike."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Additional keys of config.json with the only value that megafork supports, which is also their default."""
    ignored: tuple[str, ...] = ()
    """Additional keys of config.json that have no effect."""
    counts: tuple[str, ...] = ()
    """Keys for which transformers accepts only whole numbers, although nothing is computed from them."""
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Name suffixes of tensors that some files hold in addition to the parameters, and that follow from config.json anyway."""
    vllm_reads_head_dim: bool = True
    """Whether vLLM reads head_dim from config.json. For some families it always uses hidden_size / num_attention_heads."""

    @cached_property
    def tied_head(self) -> Rule:
        """The head tied to the embedding: a separate parameter on the last of several pipeline stages."""
        return replace(self.head, tensors=self.embedding.tensors)

    @property
    def qk_norm(self) -> bool:
        return self._has("self_attention.q_layernorm.weight")

    @property
    def qkv_bias(self) -> bool:
        return self._has("self_attention.linear_qkv.bias")

    def _has(self, megatron: str) -> bool:
        return any(rule.megatron == megatron for rule in self.layer)

    def hf_name(self, tensor: HFTensor, layer: int | None, expert: int | None = None) -> str:
        """A tensor's name in the files; `layer` is None for a tensor outside the layers, `expert` for one that is not an expert's."""
        return tensor.name if layer is None else f"{self.layers}.{layer}.{tensor.name.replace('*', str(expert))}"

    def find(self, name: str) -> tuple[Rule, HFTensor] | None:
        """The declaration of the tensor that the files call `name`, regardless of the layer (or expert) numbers in it; None if the family
        has no such tensor."""
        return self._by_name.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))

    def expert_of(self, name: str) -> int:
        """The number of the expert to which the files' tensor `name` belongs, one of `experts`."""
        tensor = self.find(name)
        assert tensor is not None, name
        pattern = re.escape(f"{self.layers}.*.{tensor[1].name}").replace(r"\*", r"(\d+)")
        found = re.fullmatch(pattern, name)
        assert found is not None, name
        return int(found[2])

    @cached_property
    def _by_name(self) -> dict[str, tuple[Rule, HFTensor]]:
        outside = {tensor.name: (rule, tensor) for rule in (self.embedding, self.final_norm, self.head) for tensor in rule.tensors}
        inside = (*self.layer, *self.sparse_layer, *self.experts)
        return outside | {f"{self.layers}.*.{tensor.name}": (rule, tensor) for rule in inside for tensor in rule.tensors}


def _share(size: int, parts: int, part: int) -> Span:
    return part * (size // parts), (part + 1) * (size // parts)
