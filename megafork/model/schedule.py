"""Runs packed micro-batches through the policy with Megatron's pipeline schedule, for training and for scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megafork.model.attention import PackedSequences
from megafork.model.policy import HeadRequest

Routing = Literal["replay", "note", "own"]


class Packed(Protocol):
    """The parts of a micro-batch (`rl.batch.MicroBatch`) that the schedule needs."""

    tokens: Tensor
    lengths: tuple[int, ...]
    places: Tensor
    order: Tensor | None
    owner: Tensor
    balance: float
    routing: Tensor | None
    positions: Tensor
    positions_on_host: Tensor
    targets: Tensor
    temperature: Tensor
    entropy_temperature: float

    @property
    def selected(self) -> Tensor: ...
    @property
    def selected_on_host(self) -> Tensor: ...


def run_micro_batches(
    model: Sequence[Any],
    micros: Sequence[Packed],
    loss: Callable[..., Any],
    *,
    cp: int,
    forward_only: bool,
    everywhere: bool,
    temperature_of: Callable[[Tensor], Tensor] | None = None,
    entropy_grad: bool = False,
    routing: Routing = "replay",
) -> None:
    """Run this rank's model chunks over the micro-batches. Every rank of the layout must call, with the same number of micro-batches.

    `everywhere`: the head answers at all positions, with entropies at `entropy_temperature` and log-probs at it or, if `temperature_of`
    is set, at the temperatures that it returns (see HeadRequest); otherwise at the positions in the mask, at each token's `temperature`.
    `entropy_grad`: these entropies carry a gradient.
    `routing`: whether routers take the experts that a micro-batch has (`replay`), write their own choice into it (`note`), or choose
    without regard to it (`own`).
    On the last stage `loss(micro, (log_prob, entropy))` must return what Megatron's schedule expects of a loss; if `forward_only`, it is
    called with `non_loss_data=True` and may return anything.
    """
    get_forward_backward_func()(
        forward_step_func=partial(
            _forward, loss=loss, temperature_of=temperature_of, everywhere=everywhere, entropy_grad=entropy_grad, routing=routing
        ),
        data_iterator=[iter(micros) for _ in model] if len(model) > 1 else iter(micros),
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=len(micros),
        seq_length=max(micro.tokens.size(1) for micro in micros) * cp,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _forward(
    micros: Iterator[Packed],
    model: Any,
    *,
    loss: Callable[..., Any],
    temperature_of: Callable[[Tensor], Tensor] | None,
    everywhere: bool,
    entropy_grad: bool,
    routing: Routing,
) -> tuple[Any, Callable[..., Any]]:
    micro = next(micros)
    request = None
    if getattr(model, "module", model).post_process:
        if everywhere:
            at = torch.full_like(micro.temperature, micro.entropy_temperature)
            request = HeadRequest(micro.positions, micro.targets, at, temperature_of, on_host=micro.positions_on_host)
        else:
            at = micro.selected
            on_host = micro.positions_on_host[micro.selected_on_host]
            request = HeadRequest(micro.positions[at], micro.targets[at], micro.temperature[at], entropy_grad=entropy_grad, on_host=on_host)
    packing = PackedSequences.packed(
        micro.lengths,
        micro.places,
        micro.order,
        owner=micro.owner,
        balance=micro.balance,
        routing=None if routing == "own" else micro.routing,
        note_routing=routing == "note",
    )
    output = model(micro.tokens, None, None, labels=request, packed_seq_params=packing)
    return output, partial(loss, micro)
