"""Distributed checkpoints hold pickles, and torch (2.13) and megatron-core (0.16.1 to 0.19) run whatever code is in them.

The index `.metadata` is read by `pickle.load`, plain values in the shards by `torch.load(weights_only=False)`, and `common.pt` by torch's
restricted default, which TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD turns off (some images set it). Here each has a list of the types it may name.
"""

from __future__ import annotations

import collections
import contextlib
import pickle
import re
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException

from megafork.compat import cpu

cpu.install()

from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy  # noqa: E402
from megatron.core.msc_utils import MultiStorageClientFeature  # noqa: E402


class ForbiddenType(pickle.UnpicklingError):
    """A file names a type or a function that no file of its kind needs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"GLOBAL {self.name} is not allowed"  # torch's wording, which `naming_forbidden_types` looks for within other errors


def _enum_member(owner: Any, name: str) -> Enum:
    """Stand-in for `getattr`, as which Python 3.11.0 to 3.11.3 pickle an enum member."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise ForbiddenType("builtins.getattr")
    return owner[name]


_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            planner.BytesIOWriteData,
            planner.SavePlan,
            planner.TensorWriteData,
            planner.WriteItem,
            planner.WriteItemType,
            collections.OrderedDict,
            torch.Size,
            set,
        )
    },
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("builtins", "getattr"): _enum_member,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),  # where the file was written, which nothing uses
    ("pathlib", "Path"): lambda *parts: "/".join(parts),
    # from older versions
    (_OLD_METADATA, "TensorProperties"): metadata.TensorProperties,
    (_OLD_METADATA, "MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    (_MEGATRON, "MCoreMetadata"): metadata.Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise ForbiddenType(f"{module}.{name}")


def read_index(file: IO[bytes]) -> Any:
    """The object pickled in `.metadata`, usually a `Metadata`, whose chunks are in files of the same folder.

    Raises ForbiddenType for types that an index does not need, ValueError for files elsewhere, and whatever `pickle` raises for a file that
    is not a pickle.
    """
    index = _IndexUnpickler(file).load()
    for where in (getattr(index, "storage_data", None) or {}).values():
        if where.relative_path != Path(where.relative_path).name:
            raise ValueError(f"a part of it is elsewhere, at {where.relative_path!r}")
    return index


def read_common(folder: Path) -> dict[str, Any]:
    """Read `common.pt` of a checkpoint: plain values, tensors, and types that Megatron-core declares safe (`megatron.core.safe_globals`).

    Raises ForbiddenType, OSError, and RuntimeError or UnpicklingError for a damaged file.
    """
    with naming_forbidden_types():
        return torch.load(folder / "common.pt", map_location="cpu", weights_only=True)


@contextlib.contextmanager
def naming_forbidden_types() -> Iterator[None]:
    """Turn torch's long error about a type that it refused to load, also from within a distributed load, into ForbiddenType."""
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        causes = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        for cause in causes:
            if match := re.search(r"GLOBAL ([\w.]+)", str(cause)):
                raise ForbiddenType(match[1]) from None
        raise


class CommonValues(TorchCommonLoadStrategy):
    """Strategy for `dist_checkpointing.load` that reads `common.pt` by `read_common`."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return read_common(Path(checkpoint_dir))


class NoCommonValues(TorchCommonLoadStrategy):
    """Strategy for `dist_checkpointing.load` that skips `common.pt`, for callers that want only tensors."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}


def _load_bytes(self: Any, read_item: Any, value: Any) -> None:
    """`DefaultLoadPlanner.load_bytes`, restricted."""
    loaded, key = torch.load(value, weights_only=True), read_item.dest_index.fqn
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[key], loaded)
    else:
        self.state_dict[key] = loaded


def install() -> None:
    """Restrict every distributed load of this process. Idempotent."""
    filesystem.pickle = types.SimpleNamespace(load=read_index, dump=pickle.dump)  # type: ignore[assignment]
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    MultiStorageClientFeature.disable()  # with that package Megatron-core reads along other paths, which unpickle too
