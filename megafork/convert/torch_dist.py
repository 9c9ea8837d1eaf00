"""Megatron's distributed checkpoint format (`torch_dist`), written and read by one process, one chunk in memory at a time.

A checkpoint is a set of tensors by key, each split into chunks. A chunk is the output of `torch.save`, appended to some `*.distcp` file;
`.metadata` locates the chunks. A reader of any layout takes the parts it needs from the existing chunks. This is the format of
`torch.distributed.checkpoint`, whose own writer collects a whole file's tensors in memory; the tests load the files written here with
megatron-core, and vice versa.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo  # a chunk's location: part of the format, pickled in .metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view  # a part of a file as a file; torch's own reader uses it

from megafork.compat.pickles import ForbiddenType, naming_forbidden_types, read_index
from megafork.recipe import RecipeError

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


class DistWriter:
    """Writes a checkpoint into an empty folder: chunks within `file(name)`, then `finish`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None
        self._name = ""
        self._tensors: dict[str, Any] = {}
        self._where: dict[MetadataIndex, _StorageInfo] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[None]:
        """Chunks added within the block go into this file."""
        with (self.folder / name).open("wb") as self._file:
            self._name = name
            yield

    def add(self, key: str, size: Sequence[int], offset: Sequence[int], chunk: Tensor) -> None:
        """Write the chunk of tensor `key` (of total `size`) that begins at `offset`."""
        if chunk.untyped_storage().nbytes() != chunk.nbytes:
            chunk = chunk.clone()  # torch.save writes whole storages
        known = self._tensors.setdefault(key, TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(size), []))
        assert known.properties.dtype == chunk.dtype and known.size == torch.Size(size), key
        known.chunks.append(ChunkStorageMetadata(torch.Size(offset), chunk.size()))
        self._append(MetadataIndex(key, offset), chunk)

    def add_value(self, key: str, value: Any) -> None:
        """Write a plain value, as megatron-core's `ShardedObject` does."""
        self._tensors[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [value])

    def _append(self, index: MetadataIndex, value: Any) -> None:
        assert self._file is not None
        start = self._file.tell()
        torch.save(value, self._file)
        self._where[index] = _StorageInfo(self._name, start, self._file.tell() - start)

    def finish(self, common: dict[str, Any]) -> None:
        """Write the index, and `common`: the plain values that every rank reads."""
        torch.save(common, self.folder / "common.pt")
        index = Metadata(self._tensors, planner_data={}, storage_data=self._where, storage_meta=StorageMeta(), version="1.0.0")
        (self.folder / ".metadata").write_bytes(pickle.dumps(index))
        (self.folder / "metadata.json").write_text(json.dumps(_FORMAT))


class DistReader:
    """The tensors of a checkpoint, whoever wrote it.

    The files are untrusted: the index is read with a list of allowed types, and the chunks as plain tensors. Other values are not read at
    all. Raises ValueError, with the reason, for a folder that is not a `torch_dist` checkpoint, an invalid index, or incomplete files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = self._index()
        try:
            self._tensors = {key: tensor for key, tensor in found.state_dict_metadata.items() if isinstance(tensor, TensorStorageMetadata)}
            self._where: dict[MetadataIndex, _StorageInfo] = found.storage_data
            self._check_parts()
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its index is not well formed ({type(error).__name__}: {error})") from None

    def _index(self) -> Metadata:
        try:
            backend = json.loads((self.folder / "metadata.json").read_text())["sharded_backend"]
            with (self.folder / ".metadata").open("rb") as file:
                index = read_index(file)
        except FileNotFoundError as error:
            raise ValueError(f"it has no {Path(error.filename).name}") from None
        except ForbiddenType as error:
            raise ValueError(f"its index names {error.name}, which no index needs, and was not loaded") from None
        except (
            OSError,
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            AttributeError,
            ImportError,
            IndexError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"its index cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
        if backend != "torch_dist":
            raise ValueError(f"its format is {backend!r}, not 'torch_dist'")
        if not isinstance(index, Metadata):
            raise ValueError("its .metadata is not an index")
        return index

    def _check_parts(self) -> None:
        """Raise ValueError unless every chunk is within its file and the chunks fill their tensors."""
        ends: dict[str, int] = {}
        for where in self._where.values():
            ends[where.relative_path] = max(ends.get(where.relative_path, 0), where.offset + where.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size < end:
                raise ValueError(f"{name} has {file.stat().st_size} of {end} bytes")
        for key, tensor in self._tensors.items():
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
                raise ValueError(f"{key} is not complete")

    def keys(self) -> set[str]:
        return set(self._tensors)

    def size(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """Read a whole tensor or, of a stacked one, the part at `index` of its first dimensions. Holds at most the result and one chunk in
        memory."""
        stored = self._tensors[key]
        box = [(place, place + 1) for place in index] + [(0, size) for size in stored.size[len(index) :]]
        whole: Tensor | None = None
        for chunk in stored.chunks:
            held = [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            common = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(box, held, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            part = self._load(MetadataIndex(key, chunk.offsets))[_slices(common, held)]
            if common == box:
                whole = part
                break
            if whole is None:
                whole = torch.empty([stop - start for start, stop in box], dtype=part.dtype)
            whole[_slices(common, box)] = part
            del part
        assert whole is not None
        return whole[(0,) * len(index)]

    def _load(self, index: MetadataIndex) -> Tensor:
        where = self._where[index]
        path = self.folder / where.relative_path
        with path.open("rb") as file:
            chunk: Any = _create_file_view(file, where.offset, where.length)
            try:
                with naming_forbidden_types():
                    loaded = torch.load(chunk, map_location="cpu", weights_only=True)
            except ForbiddenType as error:
                raise RecipeError(f"{str(path)!r} holds {error.name} in place of {index.fqn}, and was not loaded") from None
        if not isinstance(loaded, Tensor):
            raise RecipeError(f"{str(path)!r} holds no tensor in place of {index.fqn}: copy or convert it again")
        return loaded


def _slices(box: Sequence[tuple[int, int]], within: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """A box relative to the start of another."""
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(box, within, strict=True))
