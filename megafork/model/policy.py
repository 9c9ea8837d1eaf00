"""The policy: Megatron's GPTModel with a head that returns log-prob and entropy at requested positions and never builds [tokens, V]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megafork.model.attention import PackedSequences
from megafork.parallel.vocab import gather_rows, log_prob_and_entropy


@dataclass(frozen=True)
class HeadRequest:
    """A request to the head for one packed micro-batch.

    positions [P] int64: indices into this CP rank's packed tokens; targets [P] int64: the token that follows each; temperature fp32 [P].
    temperature_of: maps the entropies [P] to the temperatures of the log-probs [P]; if unset, both use `temperature`.
    entropy_grad: whether gradients flow through the entropy.
    on_host: the positions in host memory; if unset, sequence parallelism waits for the device to obtain them.
    """

    positions: Tensor
    targets: Tensor
    temperature: Tensor
    temperature_of: Callable[[Tensor], Tensor] | None = None
    entropy_grad: bool = False
    on_host: Tensor | None = None


class Answer(NamedTuple):
    """The head's answer to a request for P positions."""

    log_prob: Tensor
    """fp32 [P]."""
    entropy: Tensor
    """fp32 [P], nats."""

    @property
    def device(self) -> torch.device:
        """Megatron's schedule asks the output of a model with experts for it."""
        return self.log_prob.device


class VocabHead(ColumnParallelLinear):
    """Output projection that returns log-probs and entropies instead of logits.

    It is called as a module rather than as a function of its weight, so that the hooks of Megatron's DDP run.
    All TP ranks must call with the same request.
    """

    real_vocab_size: int
    chunk: int | None

    def forward(self, hidden: Tensor, request: HeadRequest, weight: Tensor | None = None) -> Answer:
        """hidden: [T, 1, H], or [T / tp, 1, H] with sequence parallelism."""
        rows, at = hidden.squeeze(1), request.positions
        answer = partial(
            log_prob_and_entropy,
            gather_rows(rows, at, self.tp_group, request.on_host) if self.sequence_parallel else rows.index_select(0, at),
            self.weight if weight is None else weight,
            request.targets,
            vocab_size=self.real_vocab_size,
            group=self.tp_group,
            entropy_grad=request.entropy_grad,
            chunk=self.chunk,
        )
        log_prob, entropy = answer(temperature=request.temperature)
        if request.temperature_of is not None:
            log_prob, _ = answer(temperature=request.temperature_of(entropy.detach()))
        return Answer(log_prob, entropy)


class Policy(GPTModel):
    """GPTModel whose `labels` argument is a HeadRequest; the last pipeline stage returns (log_prob [P], entropy [P])."""

    def __init__(self, *args: Any, real_vocab_size: int, head_chunk: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = VocabHead
            self.output_layer.real_vocab_size = real_vocab_size
            self.output_layer.chunk = head_chunk

    def forward(self, *args: Any, packed_seq_params: PackedSequences, **kwargs: Any) -> Any:
        if self.config.apply_rope_fusion:
            packing = packed_seq_params.for_fused_layers()
        else:
            packing = packed_seq_params.for_plain_layers(self.pg_collection.cp.size(), self.pg_collection.cp.rank())
        return super().forward(*args, packed_seq_params=packing, **kwargs)

    def _postprocess(self, hidden_states: Tensor, labels: HeadRequest | None, **unused: Any) -> Any:
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, labels, weight=weight)


def in_one_kernel(hidden: Tensor) -> bool:
    """Whether torch has a kernel that reads and writes this input of a norm once; it has none for the CPU."""
    return hidden.is_cuda


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 (arXiv 1910.07467). Megatron's torch norm rejects sequence parallelism; this one marks its weight
    so that its gradient is summed over the TP ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        if in_one_kernel(hidden):
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)
