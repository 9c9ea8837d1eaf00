"""Which operators CUDA refuses for tensors on two devices, and for which the host waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense.default: "a number read on the host: item, int, float or bool of a tensor",
    aten.is_nonzero.default: "bool of a tensor",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.unique_dim.default: "unique",
    aten._unique2.default: "unique",
    aten._unique.default: "unique",
}
"""Operators whose result's size or value the host must know."""
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
_NO_SCALARS = {
    "cat",
    "stack",
    "index_select",
    "gather",
    "scatter",
    "scatter_add",
    "embedding",
    "index_add",
    "index_copy",
    "mm",
    "bmm",
    "addmm",
}
"""These refuse a zero-dimensional host tensor, which pointwise operators accept."""
_WITH_MASKS = (torch.bool, torch.uint8)


def waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why the host waits for this operator on device tensors, or None."""
    if func in WAITS:
        return WAITS[func]
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in _WITH_MASKS for index in indices) and not _fills(func, args):
            return "an index that is a mask: its true positions are counted on the host"
        if any(index.device.type == "cpu" and index.dim() for index in indices):
            return "an index on the host, copied to the device"
    return None


def _fills(func: Any, args: Sequence[Any]) -> bool:
    """Whether this is `x[mask] = number`, which is a masked fill."""
    return func is not aten.index.Tensor and len(args) > 2 and args[2].numel() == 1


def mixed(func: Any, args: Sequence[Any], device: Sequence[torch.Tensor], host: Sequence[torch.Tensor]) -> bool:
    """Whether CUDA refuses the operator because some of its tensors are on the host."""
    if not device or not host or func in COPIES:
        return False
    if func in INDEXING:
        values = args[2:3] if func is not aten.index.Tensor else ()
        return args[0].device.type == "cpu" or any(value.device.type == "cpu" and value.dim() for value in values)
    strict = func._schema.name.removeprefix("aten::").rstrip("_") in _NO_SCALARS
    return strict or any(tensor.dim() for tensor in host)


def tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)
