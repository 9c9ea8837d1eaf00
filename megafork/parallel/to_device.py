"""Moves host tensors to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The host tensor on `device`: on CUDA by an asynchronous copy from pinned memory, because a copy from pageable memory makes the host
    wait until the device has finished all earlier work."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
