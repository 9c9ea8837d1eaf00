"""What a model family is made of: how its tensors are named and split in files, in Megatron and in vLLM. `families.py` holds the table.

Nothing else in the package knows the name of a tensor: loading, export, conversion, the refit, FP8 and the planner read these
declarations. No torch.
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
"""First, and one past the last."""
Kind = Literal["vocab", "qkv", "gated", "row", "replicated"]
"""How Megatron splits a parameter over its TP ranks: `weights/mapping.py` says what each means."""
_VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM pads embedding and head to it before it splits them."""


@dataclass(frozen=True)
class Axis:
    """Rows or columns of Hugging Face tensors that belong together, such as the queries of all heads."""

    name: str
    """For error messages."""
    size: Callable[[Shape], int]
    split: Literal["whole", "evenly", "by KV head", "padded"] = "whole"
    """What each rank of a vLLM engine loads: all of it, an equal part, its KV heads (several ranks share one where there are fewer heads
    than ranks), or an equal part after padding to a multiple of 64."""

    def part(self, shape: Shape, tp: int, rank: int) -> Span:
        """What rank `rank` of an engine of `tp` ranks loads."""
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
    """A tensor of the Hugging Face files."""

    name: str
    """In full; of a layer's tensor what follows the layer's number."""
    rows: tuple[Axis, ...]
    """From top to bottom; several where the files fuse what Megatron or vLLM splits apart, such as queries, keys and values."""
    columns: Axis | None = None
    """None: it has one dimension."""

    @property
    def module(self) -> str:
        """The last part of its module's name."""
        return self.name.split(".")[-2]

    def size(self, shape: Shape) -> tuple[int, ...]:
        rows = sum(axis.size(shape) for axis in self.rows)
        return (rows, self.columns.size(shape)) if self.columns else (rows,)


@dataclass(frozen=True)
class Rule:
    """A parameter of Megatron's model and the Hugging Face tensors in it."""

    megatron: str
    """Its name in Megatron's unfused layers; of a layer's parameter what follows the layer's number."""
    kind: Kind
    tensors: tuple[HFTensor, ...]
    """In Megatron's order: `qkv` takes queries, keys and values, and `gated` gate and up, from their rows one after the other."""
    fused: str | None = None
    """Its name where Transformer Engine fuses it with the linear that follows, which is also its key in Megatron's checkpoints; None: the
    same name."""
    norm: bool = False
    """An RMS norm's weight."""
    fp8: bool = False
    """A projection's weight: FP8 quantises these alone, and Megatron keeps an extra state beside each."""

    @property
    def module(self) -> str:
        """Megatron's name of the module that it belongs to."""
        return self.megatron.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Family:
    """What the models of one architecture compute, in which tensors, and what transformers takes where config.json leaves a key out.

    Every family has pre-norm layers of RMS norms, rotary positions, SiLU, a gated MLP, and no biases but those among its parameters.
    """

    model_type: str
    models: str
    """Published models of this family that megafork trains, as the documentation lists them."""
    embedding: Rule
    layer: tuple[Rule, ...]
    """Of each layer, in the order in which Megatron's modules register them."""
    final_norm: Rule
    head: Rule
    """Where config.json does not tie it to the embedding."""
    positions: int
    """max_position_embeddings."""
    layers: str = "model.layers"
    """The Hugging Face module that holds the layers by number."""
    kv_heads: int | None = None
    """num_key_value_heads; None: as many as there are heads."""
    head_dim: int | None = None
    """head_dim; None: hidden_size / num_attention_heads."""
    nulls: tuple[str, ...] = ("num_key_value_heads", "partial_rotary_factor")
    """Keys of which transformers takes null; num_key_value_heads is then the number of heads, whatever `kv_heads` says."""
    whole_heads: bool = False
    """Whether hidden_size must be a multiple of num_attention_heads, also where head_dim is given."""
    norm_eps: float = 1e-6
    """rms_norm_eps."""
    window: Literal["off", "refused", "on"] = "refused"
    """What a `sliding_window` does: nothing (another key turns it on, and is refused), another thing in vLLM than in transformers, or
    narrow attention in both: then it is accepted where it covers all positions."""
    sliding_window: int | None = None
    rope_theta: float = 10000.0
    ropes: tuple[str, ...] = ("default", "llama3", "yarn")
    """Types of rotary positions that transformers reads as megafork does."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of config.json with the one value that megafork computes; an absent one has it."""
    ignored: tuple[str, ...] = ()
    """Further keys of config.json that change nothing."""
    counts: tuple[str, ...] = ()
    """Keys that transformers takes as whole numbers alone, although nothing is computed from them."""
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of the names of tensors that some files hold beside the parameters, and that config.json tells as well."""
    vllm_reads_head_dim: bool = True
    """vLLM takes hidden_size / num_attention_heads for the head_dim of some families, whatever config.json says."""

    @cached_property
    def tied_head(self) -> Rule:
        """The head that is the embedding: a parameter of its own on the last of several pipeline stages."""
        return replace(self.head, tensors=self.embedding.tensors)

    @property
    def qk_norm(self) -> bool:
        return self._has("self_attention.q_layernorm.weight")

    @property
    def qkv_bias(self) -> bool:
        return self._has("self_attention.linear_qkv.bias")

    def _has(self, megatron: str) -> bool:
        return any(rule.megatron == megatron for rule in self.layer)

    def hf_name(self, tensor: HFTensor, layer: int | None) -> str:
        """A tensor's name in the files; `layer` None: it lies outside the layers."""
        return tensor.name if layer is None else f"{self.layers}.{layer}.{tensor.name}"

    def find(self, name: str) -> tuple[Rule, HFTensor] | None:
        """The declaration of the tensor that the files call `name`, whatever the numbers of layers (or experts) in it; None for one that
        the family does not have."""
        return self._by_name.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))

    @cached_property
    def _by_name(self) -> dict[str, tuple[Rule, HFTensor]]:
        outside = {tensor.name: (rule, tensor) for rule in (self.embedding, self.final_norm, self.head) for tensor in rule.tensors}
        return outside | {f"{self.layers}.*.{tensor.name}": (rule, tensor) for rule in self.layer for tensor in rule.tensors}


def _share(size: int, parts: int, part: int) -> Span:
    return part * (size // parts), (part + 1) * (size // parts)
