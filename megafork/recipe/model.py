"""The model of a run: its path, how it is split over ranks, and its precision."""

from __future__ import annotations

import math
import os
from typing import Literal

from pydantic import field_validator, model_validator

from megafork.recipe.kinds import Count, Ranks, Section

Kernels = Literal["auto", "fused", "plain"]


class Model(Section):
    path: str
    """Hugging Face model folder (config.json, safetensors, tokenizer), or `owner/model` on the hub. `~` is the home directory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward: none, core attention only, or whole layers."""
    kernels: Kernels = "auto"
    """What computes the layers. `fused`: Transformer Engine's layers, which need a GPU and `precision.dtype: bf16`. `plain`: Megatron's and
    PyTorch's own. `auto`: fused where both are possible, else plain. Weights and checkpoints are the same for both, and so is routing."""

    @field_validator("path")
    @classmethod
    def _at_home(cls, path: str) -> str:
        return os.path.expanduser(path)


class Parallel(Section):
    tp: Ranks = 1
    """Tensor parallel size: ranks that share each layer's weights."""
    pp: Ranks = 1
    """Pipeline parallel size: stages of consecutive layers."""
    vpp: Ranks = 1
    """Virtual pipeline size: model chunks per stage (interleaved schedule)."""
    cp: Ranks = 1
    """Context parallel size: ranks that share each sequence's tokens."""
    cp_comm: Literal["p2p", "a2a", "all_gather"] | None = None
    """How CP ranks exchange keys and values. Fused layers (`model.kernels`): `p2p`, in a ring while they compute, or `a2a`, heads against
    tokens, which needs cp to divide the key-value heads of a TP rank. Plain layers: `all_gather`. Unset: p2p, or all_gather."""
    sp: bool = False
    """Sequence parallel: split norms and residuals over the TP ranks (needs tp > 1)."""
    ep: Ranks = 1
    """Expert parallel size: groups of ranks that share the experts of each layer. They are formed from a stage's ranks, whatever their
    tp, cp and dp. 1: every rank has its share of all experts, which are split like an MLP over tp."""
    etp: Ranks | None = None
    """Expert tensor parallel size, with ep above 1: ranks that share each expert's weights. Unset: 1, whole experts."""
    first_stage_layers: Count | None = None
    """Layers of the first pipeline stage, which also holds the embedding. Unset: as many as in each middle stage."""
    last_stage_layers: Count | None = None
    """Layers of the last pipeline stage, which also holds the head. Unset: as many as in each middle stage."""

    @model_validator(mode="after")
    def _possible(self) -> Parallel:
        if self.sp and self.tp == 1:
            raise ValueError("parallel.sp is true but parallel.tp is 1: set parallel.sp=false, or a tp above 1")
        if self.etp is not None and self.ep == 1:
            raise ValueError(
                f"parallel.etp is {self.etp} but parallel.ep is 1: without expert parallelism, experts are split over tp; leave etp out, "
                "or set an ep above 1"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp is {self.vpp} but parallel.pp is 1: set parallel.vpp=1, or a pp above 1")
        if self.cp_comm is not None and self.cp == 1:
            raise ValueError(f"parallel.cp_comm is {self.cp_comm} but parallel.cp is 1: leave it out, or set a cp above 1")
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) is not None and self.pp == 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)} but parallel.pp is 1: leave it out, or set a pp above 1")
        return self

    def cp_comm_problem(self, *, fused: bool) -> str | None:
        """Why fused or plain layers cannot communicate as `cp_comm` says, and the fix; None if they can."""
        if self.cp_comm is None or fused == (self.cp_comm != "all_gather"):
            return None
        if fused:
            return (
                "parallel.cp_comm is all_gather with fused layers: Transformer Engine gathers no packed sequences; set cp_comm=p2p or "
                "cp_comm=a2a, or model.kernels=plain"
            )
        return f"parallel.cp_comm is {self.cp_comm} with plain layers: they gather keys and values; leave it out, or set cp_comm=all_gather"

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert's weights."""
        return self.tp if self.ep == 1 else self.etp or 1

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that the layout can be used on: whole copies of the model, and whole groups of experts in each stage."""
        return math.lcm(self.tp * self.cp, self.ep * self.expert_tp) * self.pp

    @property
    def sequence_multiple(self) -> int:
        """Multiple to which each sequence is padded: 2 cp chunks per sequence, and the same number of tokens on each sequence-parallel
        rank."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)

    def padded(self, length: int) -> int:
        """Tokens of a sequence as it is packed."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple

    @property
    def micro_batch_multiple(self) -> int:
        """Multiple to which the number of micro-batches is raised: the interleaved schedule needs complete rounds of all stages."""
        return self.pp if self.vpp > 1 else 1


class Precision(Section):
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; with bf16 the optimizer keeps fp32 main weights."""
    rollout_fp8: bool = False
    """vLLM's projections, experts' too, in e4m3, in blocks of 128 x 128 with one scale each, quantised at every refit; embedding, head,
    norms and routers stay bf16. Needs `dtype: bf16` and `loss.importance_cap`."""
    train_fp8: bool = False
    """The trainer's projections multiply in e4m3, forward and backward: activations and gradients in blocks of 1 x 128, weights of
    128 x 128, quantised on the fly by Transformer Engine. Stored weights, gradients and optimizer state keep their precision, and so do
    embedding, head, norms, attention and routers. Needs `dtype: bf16`, Transformer Engine, and a GPU that supports such blocks (H100,
    H200); a mixture of experts also needs fused layers (`model.kernels`)."""

    @model_validator(mode="after")
    def _fp8_beside_bf16(self) -> Precision:
        for name, user in (("rollout_fp8", "vLLM"), ("train_fp8", "Transformer Engine")):
            if getattr(self, name) and self.dtype != "bf16":
                raise ValueError(f"precision.{name} is true with precision.dtype={self.dtype}: {user} needs bf16 with it; set dtype=bf16")
        return self
