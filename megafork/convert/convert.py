"""Converts a model from Hugging Face's format to Megatron's and back, in one process without a GPU, one tensor in memory at a time.

Megatron's distributed format is independent of the layout: whatever `tp` and `pp` a checkpoint was written for, every layout can load it.
They determine how the weights are split into chunks and files: a rank of that layout finds exactly its bytes in one file, and a rank of
another layout reads whole chunks and keeps its part. So choose the layout that will train, or leave both at 1 when in doubt.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from megafork.convert import fp8_folder
from megafork.convert.checkpoint_keys import Stored, chunks, extra_state, stored_parameters
from megafork.convert.sources import HF, open_huggingface, open_source
from megafork.convert.torch_dist import DistWriter
from megafork.model.fp8 import Quantized, config_entries
from megafork.recipe import Key, Parallel, RecipeError, calling
from megafork.shape import Shape, check_layout
from megafork.weights.checksums import write_sums
from megafork.weights.huggingface import HuggingFaceWeights, copy_companions, replaced
from megafork.weights.mapping import pieces, shard_shape, stage_of
from megafork.weights.shards import Spec, write_shards

Dtype = Literal["keep", "fp32", "bf16"]
_AS_ARGUMENTS = {"model.path": "SRC", "parallel.tp": "--tp", "parallel.pp": "--pp"}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BAND = 64 << 20
"""Bytes of a Hugging Face tensor read at a time."""

Tick = Callable[[int, int], None]
"""Progress callback: bytes done since the last call, and total bytes."""


@dataclass(frozen=True)
class Converted:
    """The result of a conversion. `logit_difference`: the largest found by `verify`; None if it compared only tensors, or nothing."""

    target: Path
    tensors: int
    bytes: int
    logit_difference: float | None = None


def hf_to_megatron(
    source: Path, target: Path, *, tp: int = 1, pp: int = 1, dtype: Dtype = "keep", verify: bool = False, progress: Tick | None = None
) -> Converted:
    """Write the Hugging Face folder `source` as the Megatron checkpoint `target`, which keeps config and tokenizer in `target/hf`.

    `verify` reads everything back and compares logits in fp32, which needs memory for the whole model. Raises RecipeError for invalid
    input and VerifyError for wrong output; in both cases, and when interrupted, no `target` is left.
    """
    source, target = _at_home(source), _at_home(target)
    _check_target(target)
    with calling(_AS_ARGUMENTS):
        if not source.is_dir():
            raise RecipeError(Key("model.path"), f" is {str(source)!r}: no such folder; give a Hugging Face folder")
        model, weights = open_huggingface(source, keep=dtype == "keep")
        layout = _layout(model.shape, tp, pp)
    specs = _converted(model.specs, dtype)
    tick = _counter(progress, specs, passes=1 + verify)
    difference = None
    with calling(_AS_ARGUMENTS), replaced(target) as folder:
        _write_megatron(folder, weights, model.shape, layout, specs[0].dtype, tick)
        (folder / HF).mkdir()
        copy_companions(model.like, folder / HF, _dtype_change(specs, dtype))
        write_sums(folder)
        if verify:
            from megafork.convert.verify import compare_logits, compare_tensors

            compare_tensors(model, open_source(folder, keep=True), tick)
            difference = compare_logits(source, folder, model.shape, specs[0].dtype)
    return Converted(target, len(specs), sum(spec.nbytes for spec in specs), difference)


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    dtype: Dtype = "keep",
    fp8: bool = False,
    quantize: str | None = None,
    verify: bool = False,
    progress: Tick | None = None,
) -> Converted:
    """Write the Megatron checkpoint `source` (converted, or from a run) as the Hugging Face folder `target`.

    `source` may also be a Hugging Face folder, which is rewritten. `fp8` writes the projections in blocks of 128 x 128 with scales;
    `quantize`, the name of a config, quantises by nvidia-modelopt, which needs memory for the whole model. `verify` and errors as for
    `hf_to_megatron`, except that for FP8 only tensors are compared.
    """
    source, target = _at_home(source), _at_home(target)
    _check_target(target)
    if quantize is not None:
        from megafork.convert.quantize import check_model, check_quantize, quantize_folder

        check_quantize(quantize, fp8=fp8, verify=verify)
    with calling(_AS_ARGUMENTS):
        model = open_source(source, keep=dtype == "keep")
    if quantize is not None:
        check_model(quantize, model.shape)
    specs = _converted(model.specs, dtype)
    tensors = model.read()
    if fp8:
        fp8_folder.check_folder(model.shape, specs)
        specs, tensors = fp8_folder.quantized_specs(model.shape, specs), iter(Quantized(tensors, model.shape))
    tick = _counter(progress, specs, passes=1 + verify)
    changes = _dtype_change(specs, dtype) | (config_entries(model.shape) if fp8 else {})
    difference = None
    with calling(_AS_ARGUMENTS), replaced(target) as folder:
        plain = folder if quantize is None else folder / "plain"
        plain.mkdir(exist_ok=True)
        copy_companions(model.like, plain, changes)
        write_shards(plain, specs, _counted(specs, tensors, tick))
        if quantize is not None:
            quantize_folder(plain, folder, quantize)
            shutil.rmtree(plain)
        if verify:
            from megafork.convert.verify import compare_blocks, compare_logits, compare_tensors

            if fp8:
                compare_blocks(model, folder, tick)
            else:
                compare_tensors(model, open_source(folder, keep=True), tick)
                if source != model.like:
                    difference = compare_logits(folder, source, model.shape, specs[0].dtype)
    return Converted(target, len(specs), sum(spec.nbytes for spec in specs), difference)


@contextmanager
def progress_bar(label: str) -> Iterator[Tick]:
    """Show a progress bar on standard error, if that is a terminal; yields the `Tick` that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, advance=done, total=total)


def _write_megatron(
    folder: Path, source: HuggingFaceWeights, shape: Shape, layout: Parallel, dtype: torch.dtype, tick: Callable[[int], None]
) -> None:
    writer = DistWriter(folder)
    stored = list(stored_parameters(shape, layout.tp))
    for stage in range(layout.pp):
        mine = [s for s in stored if stage_of(s.parameter, shape, layout) == stage]
        for rank in range(layout.tp):
            with writer.file(f"__{stage * layout.tp + rank}_0.distcp"):
                for s in mine:
                    if rank and s.parameter.rule.kind == "replicated":
                        continue
                    for offset, chunk in chunks(s, _shard(source, s, shape, layout.tp, rank, dtype), layout.tp, rank):
                        writer.add(s.key, s.size, offset, chunk)
                        tick(chunk.nbytes)
                if rank == 0:
                    for key in filter(None, map(extra_state, mine)):
                        writer.add_value(key, None)
    writer.finish({"content_metadata": {"singleton_local_shards": False}})


def _shard(source: HuggingFaceWeights, stored: Stored, shape: Shape, tp: int, rank: int, dtype: torch.dtype) -> Tensor:
    """A TP rank's shard, read band by band, so that no more than a band of the mapped file counts as this process's memory."""
    shard = torch.zeros(shard_shape(stored.parameter, shape, tp), dtype=dtype)
    for piece in pieces(stored.parameter, shape, tp, rank):
        row = 4 * (source.shape(piece.name)[-1] if shard.dim() > 1 else 1)
        step = max(1, _BAND // row)
        for first in range(*piece.rows, step):
            last = min(first + step, piece.rows[1])
            at = piece.at + first - piece.rows[0]
            shard[at : at + last - first] = source.read(piece.name, (first, last), piece.columns)
    return shard


def _at_home(path: Path) -> Path:
    """The path with `~` for the home directory."""
    return Path(os.path.expanduser(path))


def _check_target(target: Path) -> None:
    if os.path.lexists(target):  # also a link that leads nowhere
        raise RecipeError(f"DST is {str(target)!r}: it already exists; delete it, or choose another name")
    there = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"DST is {str(target)!r}: {str(there)!r} is not a folder that can be written to; choose another place")


def _layout(shape: Shape, tp: int, pp: int) -> Parallel:
    """The layout to split tensors for. A TP rank need not get whole heads here: that matters only when loading."""
    if min(tp, pp) < 1:
        raise RecipeError(f"--tp is {tp} and --pp is {pp}: both must be 1 or more")
    attention = shape.heads * shape.head_dim
    keys_and_values = 2 * shape.kv_heads * shape.head_dim
    sizes = [("attention", attention), ("query, key and value", attention + keys_and_values)]
    if shape.has_mlp:
        sizes.append(("MLP", shape.ffn))
    if shape.moe is not None:
        sizes.append(("experts' MLP", shape.moe.ffn))
    for what, size in sizes:
        if size % tp:
            raise RecipeError(f"--tp is {tp} but the model's {what} has {size} rows: choose a tp that divides them")
    check_layout(shape, Parallel(pp=pp))
    return Parallel(tp=tp, pp=pp)


def _converted(specs: list[Spec], dtype: Dtype) -> list[Spec]:
    return specs if dtype == "keep" else [replace(spec, dtype=_DTYPES[dtype]) for spec in specs]


def _dtype_change(specs: list[Spec], dtype: Dtype) -> dict[str, str]:
    """The dtype entry for config.json, if it changes."""
    return {} if dtype == "keep" else {"dtype": str(_DTYPES[dtype]).removeprefix("torch.")}


def _counter(progress: Tick | None, specs: list[Spec], *, passes: int) -> Callable[[int], None]:
    total = passes * sum(spec.nbytes for spec in specs)
    return (lambda done: None) if progress is None else (lambda done: progress(done, total))


def _counted(specs: list[Spec], tensors: Iterable[tuple[str, Tensor]], tick: Callable[[int], None]) -> Iterator[tuple[str, Tensor]]:
    for spec, pair in zip(specs, tensors, strict=True):
        yield pair
        tick(spec.nbytes)
