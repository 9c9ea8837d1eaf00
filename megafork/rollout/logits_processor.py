"""Fork-aware decoding inside vLLM, enabled per request: `SamplingParams(temperature=1.0, extra_args=forks.arguments)`.

Like vLLM itself, import it after `compat.vllm.prepare`. vLLM has two logits-processor interfaces, one per model runner, and chooses the
runner only while building an engine, so `ForkProcessor` implements both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import interface as v1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from megafork.rl.fork_temperature import ARGUMENT, ForkTemperature, scale_logits

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2
except ModuleNotFoundError:  # in 0.26 the second runner has no processors, and vLLM uses the first if any are given
    ProcessorV2 = object

_NEUTRAL = (1.0, 1.0, torch.inf)


def asked_for(params: SamplingParams) -> ForkTemperature | None:
    """The fork temperatures that a request asks for. Raises ValueError for arguments that are not `ForkTemperature.arguments`."""
    values = (params.extra_args or {}).get(ARGUMENT)
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{ARGUMENT} is {values!r}: must be [low, high, threshold]")
    if params.temperature != 1.0:
        raise ValueError(f"temperature is {params.temperature} beside {ARGUMENT}, which takes its place: leave it at 1")
    return ForkTemperature(*values)


def _table(asked: dict[int, ForkTemperature], rows: int) -> Tensor:
    """Settings per row for `scale_logits`, [rows, 3]; neutral for rows that ask for nothing."""
    table = torch.tensor(_NEUTRAL).repeat(rows, 1)
    for row, forks in asked.items():
        table[row] = torch.tensor([forks.low, forks.high, forks.threshold])
    return table


class _Places:
    """Runner V1: rows of the logits are batch positions, between which vLLM moves requests."""

    def __init__(self) -> None:
        self._asked: dict[int, ForkTemperature] = {}
        self._table: Tensor | None = None

    def update(self, batch_update: Any) -> None:
        if process_dict_updates(self._asked, batch_update, lambda params, prompt, output: asked_for(params)):
            self._table = None

    def settings(self, logits: Tensor) -> Tensor | None:
        if not self._asked:
            return None
        if self._table is None or len(self._table) != len(logits):
            self._table = _table(self._asked, len(logits)).to(logits.device)
        return self._table


class _Slots:
    """Runner V2: each request keeps one slot for life, and each step's context maps the rows of the logits to slots."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._host = _table({}, slots)
        self._table = self._host.to(device, copy=True)
        self._asked = np.zeros(slots, dtype=bool)
        self._stale = False

    def add(self, slot: int, params: SamplingParams) -> bool:
        forks = asked_for(params)
        self._host[slot] = _table({} if forks is None else {0: forks}, 1)[0]  # also clears the settings of the slot's former owner
        self._asked[slot] = forks is not None
        self._stale = True
        return forks is not None

    def flush(self) -> None:
        if self._stale:
            self._table = self._host.to(self._table.device, copy=True)
            self._stale = False

    def settings(self, logits: Tensor, ctx: Any) -> Tensor | None:
        return self._table[ctx.expanded_idx_mapping] if self._asked[ctx.idx_mapping_np].any() else None


class ForkProcessor(v1.LogitsProcessor, ProcessorV2):
    """The processor passed to an engine: `LLM(logits_processors=[ForkProcessor])`. Comments name the runner that calls each method."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        asked_for(sampling_params)

    def __init__(self, vllm_config: Any, place: Any, *pin_memory: bool) -> None:
        self._requests: Any = _Places() if pin_memory else _Slots(place.max_num_reqs, place.device)  # V1 passes three arguments, V2 two

    def is_argmax_invariant(self) -> bool:  # V1
        """False although the most likely token stays the same: vLLM applies invariant processors after its own temperature, and not to
        greedy requests."""
        return False

    def update_state(self, batch_update: Any) -> None:  # V1
        self._requests.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:  # V2
        return self._requests.add(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:  # V2
        self._requests.flush()

    def apply(self, logits: Tensor, *ctx: Any) -> Tensor:  # V1 passes no context, V2 does
        settings = self._requests.settings(logits, *ctx)
        return logits if settings is None else scale_logits(logits, settings)
