"""The frozen reference of `loss.kl`: the weights that a run starts from, in host memory between their uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megafork.model.policy import Policy


class Reference:
    """A copy of one rank's weights, made when it is created. Nothing here is collective, and nothing is saved: a resumed run starts from
    the same model folder."""

    def __init__(self, chunks: list[Policy]) -> None:
        self._chunks = chunks
        self._kept = [_on_host(parameter) for parameter in self._parameters()]
        self._policy: list[Tensor] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference's weights inside; the policy's are back bit for bit at its end. No GPU memory is taken."""
        parameters = list(self._parameters())
        self._policy = self._policy or [_empty(parameter) for parameter in parameters]
        for parameter, home, reference in zip(parameters, self._policy, self._kept, strict=True):
            home.copy_(parameter)
            parameter.copy_(reference)
        try:
            yield
        finally:
            for parameter, home in zip(parameters, self._policy, strict=True):
                parameter.copy_(home)

    def _parameters(self) -> Iterator[Tensor]:
        """Detached: copies go into the same memory, whatever buffer it belongs to."""
        return (parameter.detach() for chunk in self._chunks for parameter in chunk.parameters())


def _on_host(tensor: Tensor) -> Tensor:
    return _empty(tensor).copy_(tensor.detach())


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
