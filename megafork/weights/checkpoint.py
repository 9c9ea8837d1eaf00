"""Checkpoints of a run: Megatron's distributed format, written under a temporary name and renamed, loadable under another layout."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import FileSystemReader

from megafork.compat import megatron as megatron_fixes
from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.recipe import RecipeError

_NAME = re.compile(r"step_(\d{6,})")


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def complete(checkpoints: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first. A folder that was being written when a run was killed has another name."""
    found = [(int(match[1]), entry) for entry in checkpoints.glob("step_*") if (match := _NAME.fullmatch(entry.name))]
    return sorted(found)


def save(folder: Path, chunks: list[Policy], optimizer: Any, mesh: Mesh, state: dict[str, Any], *, keep_last: int) -> None:
    """Save weights, optimizer and `state` (plain values, the same on every rank). Every rank must call.

    The folder appears under its name only when it is complete; then the oldest beyond `keep_last` are deleted.
    """
    temporary = folder.with_name(folder.name + ".writing")
    if mesh.is_rank_zero:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    megatron_fixes.use_plain_results_queue()
    content = _sharded(chunks, optimizer, mesh, loading=False)
    dist_checkpointing.save({**content, "run": state}, str(temporary), content_metadata=_content_metadata())
    dist.barrier()
    if mesh.is_rank_zero:
        _sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _sync(folder.parent)
        for _, old in complete(folder.parent)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, chunks: list[Policy], optimizer: Any, mesh: Mesh) -> dict[str, Any]:
    """Load weights and optimizer in place, saved under whatever layout, and return the `state`. Every rank must call."""
    content = _sharded(chunks, optimizer, mesh, loading=True)
    loaded = dist_checkpointing.load(content, str(folder), strict=StrictHandling.RAISE_ALL)
    for name, chunk in _named(chunks):
        chunk.load_state_dict(loaded[name])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded["run"]


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` of a checkpoint whose files are all there and whole. Needs no process group. Raises RecipeError for a damaged one."""
    mend = f"delete {str(folder)!r} to continue from the checkpoint before it, or choose another run.name"
    try:
        index = FileSystemReader(folder).read_metadata()
        common = torch.load(folder / "common.pt", weights_only=False)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"the checkpoint {folder.name} is damaged ({reason}): {mend}") from None
    sizes: dict[str, int] = {}
    for part in index.storage_data.values():
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < size:
            raise RecipeError(f"the checkpoint {folder.name} is damaged ({name} has {found} of {size} bytes): {mend}")
    return common["run"]


def _named(chunks: list[Policy]) -> list[tuple[str, Policy]]:
    return [("model" if len(chunks) == 1 else f"model{n}", chunk) for n, chunk in enumerate(chunks)]


def _content_metadata() -> dict[str, Any]:
    """`fully_reshardable` is the only sharding of the optimizer that another TP or PP can load."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def _sharded(chunks: list[Policy], optimizer: Any, mesh: Mesh, *, loading: bool) -> dict[str, Any]:
    metadata = {**_content_metadata(), "dp_cp_group": mesh.token_group}
    content: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}
    content["optimizer"] = optimizer.sharded_state_dict(dict(content), is_loading=loading, metadata=metadata)
    return content


def _sync(folder: Path) -> None:
    """Ask the disk to keep what a rename is about to promise."""
    for entry in [*folder.iterdir(), folder] if folder.is_dir() else [folder]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
