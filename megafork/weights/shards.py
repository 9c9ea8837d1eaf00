"""Writes safetensors files one tensor at a time; names, shapes and dtypes must be known before the first byte of data."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
"""safetensors' names for dtypes."""
INDEX = "model.safetensors.index.json"
_BAND = 64 << 20
"""Bytes of a tensor converted and written at a time."""


@dataclass(frozen=True)
class Spec:
    """Name, shape and dtype of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, specs: Sequence[Spec], tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = 4 << 30) -> None:
    """Write files of about `shard_bytes`, with an index if there are several, holding only the tensor being written.

    `tensors` must come in the order of `specs`, and are converted to their dtypes.
    """
    shards = list(_shards(specs, shard_bytes))
    files = shard_names(len(shards))
    coming = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, coming)
    write_index(folder, [(file, spec) for file, shard in zip(files, shards, strict=True) for spec in shard])


def write_file(file: Path, specs: Sequence[Spec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write the next tensors, as given by `specs`, to one file: the header's length, the header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = itertools.accumulate((spec.nbytes for spec in specs), initial=0)
    for spec, (start, stop) in zip(specs, itertools.pairwise(ends), strict=True):
        header[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file, so tensors must start at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            name, tensor = next(tensors)
            assert (name, tuple(tensor.shape)) == (spec.name, spec.shape), f"{name} {list(tensor.shape)} came, {spec} was said"
            for band in tensor.detach().split(max(1, _BAND * tensor.size(0) // tensor.nbytes)):
                out.write(band.to("cpu", spec.dtype).contiguous().view(torch.uint8).numpy().data)
            del tensor, band


def write_index(folder: Path, placed: Sequence[tuple[str, Spec]]) -> None:
    """Write the index of several files, from (file, tensor) pairs; write nothing for a single file."""
    if len({file for file, _ in placed}) > 1:
        total = sum(spec.nbytes for _, spec in placed)
        index = {"metadata": {"total_size": total}, "weight_map": {spec.name: file for file, spec in placed}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shard_names(count: int) -> list[str]:
    return [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]


def _shards(specs: Iterable[Spec], shard_bytes: int) -> Iterator[list[Spec]]:
    shard: list[Spec] = []
    size = 0
    for spec in specs:
        if shard and size + spec.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.nbytes
    yield shard
