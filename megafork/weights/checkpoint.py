"""A run's checkpoints: Megatron's distributed format with checksums, published by a rename, loadable under another layout."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper, FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megafork.compat import megatron as megatron_fixes
from megafork.compat import pickles
from megafork.files import check_room
from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.process import die_with_parent
from megafork.recipe import RecipeError
from megafork.weights.checksums import SUMS, sum_of, sync, sync_name
from megafork.weights.optimizer_state import load_optimizer, optimizer_content

_NAME = re.compile(r"step_(\d{6,})")
_EXTRA_STATE = re.compile(r".*_extra_state\d*")
"""Transformer Engine's experts have one each in their common module, the first without a number."""


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def complete(checkpoints: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first. Folders left unfinished by a killed run have a different name and are not included."""
    found = [(int(match[1]), entry) for entry in checkpoints.glob("step_*") if (match := _NAME.fullmatch(entry.name))]
    return sorted(found)


class Checkpoints:
    """Saves and loads a run's checkpoints. Every rank constructs one, and all ranks call each method together.

    A checkpoint appears under its name only once it is complete and on disk; then all but the newest `keep_last` are deleted.
    """

    def __init__(self, folder: Path, mesh: Mesh, *, keep_last: int, asynchronous: bool = False) -> None:
        self.folder = folder
        self.mesh = mesh
        self.keep_last = keep_last
        self.background = AsyncCallsQueue(persistent=False) if asynchronous else None
        self._written: list[Callable[[], None]] = []
        """Publishes the checkpoint that is written and not yet published, step by step; empty if there is none."""

    def save(self, step: int, chunks: list[Policy], optimizer: Any, state: dict[str, Any]) -> None:
        """`write` a checkpoint and, unless asynchronous, publish it."""
        self.write(step, chunks, optimizer, state)
        if self.background is None:
            self.settle(wait=True)

    def write(self, step: int, chunks: list[Policy], optimizer: Any, state: dict[str, Any]) -> None:
        """Write weights, optimizer and `state` (plain values, the same on every rank), all of a parameter's replicas sharing the work.

        `settle` publishes what is written. If asynchronous, one forked process per rank writes a snapshot. Raises OSError on a full disk.
        """
        self.settle(wait=True)
        with self._saying_what_is_full():
            self._write(step, chunks, optimizer, state)

    def _write(self, step: int, chunks: list[Policy], optimizer: Any, state: dict[str, Any]) -> None:
        folder = folder_of(self.folder, step)
        temporary = folder.with_name(folder.name + ".writing")
        if self.mesh.is_rank_zero:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        megatron_fixes.write_checkpoints_in_one_process()
        content = {**_sharded(chunks, optimizer, self.mesh, loading=False), "run": state}
        everyone = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), self.mesh.token_group
        )  # replicas share the weights
        request = dist_checkpointing.save(content, str(temporary), everyone, content_metadata=_content_metadata(), async_sharded_save=True)
        request.add_finalize_fn(partial(self._publish, temporary, folder))
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write_and_sum, request.async_fn, temporary, os.getpid()))
        if self.background is not None:
            self.background.schedule_async_request(request)
        else:
            request._replace(finalize_fns=[]).execute_sync()
            self._written = request.finalize_fns

    def settle(self, *, wait: bool) -> None:
        """Publish the checkpoint that has been written, or is being written in the background if every rank has written its part. `wait`:
        block until then.

        Raises OSError on a full disk.
        """
        with self._saying_what_is_full():
            written, self._written = self._written, []
            for finalize in written:
                finalize()
            if self.background is not None:
                self.background.maybe_finalize_async_calls(blocking=wait)

    @contextlib.contextmanager
    def _saying_what_is_full(self) -> Iterator[None]:
        """Raise OSError for a full disk, which can surface as many errors: any file may be truncated, on this rank or another."""
        try:
            yield
        except CheckpointException as error:  # torch's, not an Exception
            check_room(self.folder)
            raise RuntimeError(f"the checkpoint could not be written: {_reasons(error)}") from error
        except (OSError, RuntimeError, ValueError):
            check_room(self.folder)
            raise

    def load(self, step: int, chunks: list[Policy], optimizer: Any) -> dict[str, Any]:
        """Load weights and optimizer in place, saved under any layout, and return the `state`. Raises RecipeError if damaged."""
        folder = folder_of(self.folder, step)
        _verify(folder, self.mesh)
        content = _sharded(chunks, optimizer, self.mesh, loading=True)
        loaded = _load(folder, content, self.mesh, pickles.CommonValues(), strict=StrictHandling.RAISE_ALL)
        _take(chunks, loaded)
        load_optimizer(optimizer, loaded["optimizer"])
        return loaded["run"]

    def _publish(self, temporary: Path, folder: Path) -> None:
        if self.mesh.is_rank_zero:
            sums: dict[str, list[Any]] = {}
            for part in temporary.glob("sums_*"):
                sums |= json.loads(part.read_text())
                part.unlink()
            sums |= {file.name: sum_of(file) for file in temporary.iterdir() if file.name not in sums}
            (temporary / SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))
            sync(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            sync_name(folder)
            for _, old in complete(self.folder)[: -self.keep_last]:
                shutil.rmtree(old)
        dist.barrier()


def load_weights(folder: Path, chunks: list[Policy], mesh: Mesh) -> None:
    """Load only the weights of a checkpoint, saved under any layout. Every rank must call."""
    content = {name: _weights(chunk, mesh) for name, chunk in _named(chunks)}
    _take(chunks, _load(folder, content, mesh, pickles.NoCommonValues()))


def _load(folder: Path, content: dict[str, Any], mesh: Mesh, common: LoadCommonStrategy, **how: Any) -> dict[str, Any]:
    """`dist_checkpointing.load`, but without running code from the files. Raises RecipeError naming any type that could run code.

    One of a weight's replicas reads it from the file system and sends it to the others.
    """
    pickles.install()
    try:
        with pickles.naming_forbidden_types():
            once = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), mesh.token_group)
            return dist_checkpointing.load(content, str(folder), once, common, **how)
    except pickles.ForbiddenType as error:
        raise _forbidden(folder, error) from None
    except CheckpointException as error:  # torch's, not an Exception
        raise RuntimeError(f"the checkpoint {str(folder)!r} cannot be loaded: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(dict.fromkeys(f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()))


def _take(chunks: list[Policy], loaded: dict[str, Any]) -> None:
    """Load the weights into their chunks. A linear's extra state is skipped: Transformer Engine would unpickle it, and only FP8 with
    delayed scaling, which megafork does not support, needs it."""
    for name, chunk in _named(chunks):
        weights = {key: value for key, value in loaded[name].items() if not _EXTRA_STATE.fullmatch(key)}
        found = chunk.load_state_dict(weights, strict=False)
        lacking = [key for key in found.missing_keys if not _EXTRA_STATE.fullmatch(key)]
        assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)


def read_state(folder: Path) -> dict[str, Any]:
    """The `state` of a checkpoint, after checking the size of each file. Needs no process group. Raises RecipeError if damaged."""
    for name, (size, _) in _sums(folder).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise _damaged(folder, f"{name} has {found} of {size} bytes")
    try:
        return pickles.read_common(folder)["run"]
    except pickles.ForbiddenType as error:
        raise _forbidden(folder, error) from None
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise _damaged(folder, " ".join(str(error).split())[:200]) from None


def _verify(folder: Path, mesh: Mesh) -> None:
    """Verify the files against their checksums, each rank its share. If any rank finds damage, all raise RecipeError."""
    sums = _sums(folder)
    wrong = [name for name in sorted(sums)[mesh.rank :: mesh.world] if not (folder / name).is_file() or sum_of(folder / name) != sums[name]]
    found: list[list[str]] = [[] for _ in range(mesh.world)]
    dist.all_gather_object(found, wrong)
    damaged = sorted(itertools.chain(*found))
    if damaged:
        raise _damaged(folder, f"{', '.join(damaged)}: not what was written")


def _sums(folder: Path) -> dict[str, list[Any]]:
    try:
        return json.loads((folder / SUMS).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{SUMS}: {error}") from None


def _forbidden(folder: Path, error: pickles.ForbiddenType) -> RecipeError:
    return RecipeError(
        f"the checkpoint {str(folder)!r} holds {error.name}, which no checkpoint of weights needs, and was not loaded: take one from a "
        "source that you trust, or convert it by what wrote it"
    )


def _damaged(folder: Path, reason: str) -> RecipeError:
    before = [name.name for _, name in complete(folder.parent) if name < folder]
    offer = f"to continue from {before[-1]}" if before else "to start anew (there is none before it)"
    return RecipeError(f"the checkpoint {folder.name} is damaged ({reason}): delete {str(folder)!r} {offer}, or choose another run.name")


def _write_and_sum(write: Callable[..., None], folder: Path, saver: int, rank: int, *arguments: Any) -> None:
    """Write this rank's files and their checksums, in the saver's own process or in a fork of it."""
    if os.getpid() != saver:
        die_with_parent(saver)  # otherwise it would keep writing into the folder that the next run writes to
    write(rank, *arguments)
    sums = {file.name: sum_of(file) for file in folder.glob(f"__{rank}_*")}
    file = folder / f"sums_{rank}"
    try:
        file.write_text(json.dumps(sums))
    except OSError:  # rank 0 computes missing sums, or also finds the disk full
        file.unlink(missing_ok=True)


def _named(chunks: list[Policy]) -> list[tuple[str, Policy]]:
    return [("model" if len(chunks) == 1 else f"model{n}", chunk) for n, chunk in enumerate(chunks)]


def _content_metadata() -> dict[str, Any]:
    """Megatron's content metadata. `fully_reshardable` is the only optimizer sharding that loads under a different TP or PP."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def _sharded(chunks: list[Policy], optimizer: Any, mesh: Mesh, *, loading: bool) -> dict[str, Any]:
    content: dict[str, Any] = {name: _weights(chunk, mesh) for name, chunk in _named(chunks)}
    return {**content, "optimizer": optimizer_content(optimizer, content, loading=loading)}


def _weights(chunk: Policy, mesh: Mesh) -> dict[str, Any]:
    """A chunk's sharded weights: the same keys for fused and plain layers, in bf16 and FP8. Only linears have an extra state, always empty:
    Transformer Engine has one for each norm too, and in FP8 pickles its settings into them."""
    content = chunk.sharded_state_dict(metadata={**_content_metadata(), "dp_cp_group": mesh.token_group})
    for name in filter(_EXTRA_STATE.fullmatch, list(content)):
        if name.endswith("norm._extra_state"):
            del content[name]
        else:
            content[name] = replace(content[name], data=None)
    return content
