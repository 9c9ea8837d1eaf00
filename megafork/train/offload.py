"""Moves gradients and optimizer state off the GPU while vLLM uses it. The weights, which a refit reads, stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Offload:
    """Offloads one rank's DDP chunks and their optimizer. Nothing here is collective.

    While offloaded, the optimizer's tensors are the same objects with their values in host memory, so that a checkpoint can be saved;
    gradients, which the next update zeroes first, have no memory at all.
    """

    def __init__(self, model: Sequence[Any], optimizer: Any, device: torch.device) -> None:
        self._optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
        buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self._gradients = [buffer.grad_data for buffer in buffers]
        self._sizes = [gradient.untyped_storage().nbytes() for gradient in self._gradients]
        self._weights = {_place(buffer.param_data) for buffer in buffers}
        self._device = device
        self._homes: list[Tensor] = []
        """Host memory of each offloaded tensor, reused between calls."""
        self.on_host = False

    def to_host(self) -> None:
        """Free the GPU memory. Does nothing if already offloaded."""
        if self.on_host:
            return
        state = list(self._state())
        if [home.shape for home in self._homes] != [tensor.shape for tensor in state]:
            on_gpu = self._device.type == "cuda"
            self._homes = [torch.empty_like(tensor, device="cpu", pin_memory=on_gpu) for tensor in state]
        for tensor, home in zip(state, self._homes, strict=True):
            tensor.data = home.copy_(tensor, non_blocking=True)
            tensor.grad = None  # a view of the gradients
        for gradient in self._gradients:
            gradient.untyped_storage().resize_(0)
        self.on_host = True
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Move the state back and allocate gradients, which are zero."""
        if not self.on_host:
            return
        for tensor in self._state():
            tensor.data = torch.empty_like(tensor, device=self._device).copy_(tensor, non_blocking=True)
        for gradient, size in zip(self._gradients, self._sizes, strict=True):
            gradient.untyped_storage().resize_(size)
            gradient.zero_()
        self.on_host = False

    def _state(self) -> Iterator[Tensor]:
        """The optimizer's fp32 weights, unless they are the model's own, and its moments."""
        for optimizer in self._optimizers:
            adam = optimizer.optimizer
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                if _place(parameter) not in self._weights:
                    yield parameter
                yield from (value for value in adam.state[parameter].values() if isinstance(value, Tensor) and value.dim())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
