"""Sources of a conversion: a model in any form, checked, and yielded by Hugging Face name one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megafork.convert.checkpoint_keys import Stored, stored_parameters
from megafork.convert.torch_dist import DistReader
from megafork.recipe import Key, RecipeError
from megafork.shape import Shape, read_dtype, read_shape, refuse_adapter
from megafork.weights.checkpoint import complete, read_state
from megafork.weights.checksums import SUMS, damaged_files
from megafork.weights.huggingface import HuggingFaceWeights, is_finite, not_finite
from megafork.weights.mapping import full_shape, huggingface_shapes, pieces
from megafork.weights.shards import Spec

HF = "hf"
"""Folder in a converted Megatron checkpoint with the model's config and tokenizer, but no weights."""


@dataclass(frozen=True)
class Source:
    """A model whose tensors fit its config."""

    folder: Path
    like: Path
    """Folder with config.json and the tokenizer."""
    shape: Shape
    specs: list[Spec]
    """Every tensor's Hugging Face name, shape, and stored dtype."""
    read: Callable[[], Iterator[tuple[str, Tensor]]]
    """Yields the tensors in the order of `specs`, afresh on each call. A tensor may be a view, valid until the next one is read."""


def open_source(folder: Path, *, keep: bool) -> Source:
    """Open a Hugging Face folder or a Megatron checkpoint (converted, or from a run). `keep`: dtypes must match config.json."""
    if not folder.is_dir():
        raise RecipeError(Key("model.path"), f" is {str(folder)!r}: no such folder; give a Hugging Face folder or a Megatron checkpoint")
    if (folder / "metadata.json").exists() or (folder / ".metadata").exists():
        return _open_megatron(folder)
    newest = complete(folder / "checkpoints")
    if newest:
        raise RecipeError(Key("model.path"), f" is {str(folder)!r}, a run: give one of its checkpoints, such as {str(newest[-1][1])!r}")
    if not (folder / "config.json").exists():
        refuse_adapter(folder, Key("model.path"), f" is {str(folder)!r}")
        raise RecipeError(
            Key("model.path"),
            f" is {str(folder)!r}: it has neither a config.json nor a metadata.json; give a Hugging Face folder or a Megatron checkpoint",
        )
    return open_huggingface(folder, keep=keep)[0]


def open_huggingface(folder: Path, *, keep: bool) -> tuple[Source, HuggingFaceWeights]:
    """Open a Hugging Face folder, also for reading slices. Raises RecipeError listing every tensor that does not fit the config."""
    shape, named_dtype = read_shape(folder), read_dtype(folder)
    weights = HuggingFaceWeights(folder)
    try:
        weights.check(shape, dtype=getattr(torch, named_dtype) if keep and named_dtype else None, listed=None)
    except RecipeError as error:
        fix = ("; --dtype converts dtypes",) if " has dtype " in str(error) else ()
        raise RecipeError(*error.args, *fix) from None
    specs = [Spec(name, size, _known(weights.dtype(name))) for name, size in huggingface_shapes(shape).items()]
    if keep and len({spec.dtype for spec in specs}) > 1:
        raise RecipeError(Key("model.path"), f" is {str(folder)!r}: its tensors are of several dtypes; choose one with --dtype")
    return Source(
        folder, folder, shape, specs, lambda: ((spec.name, weights.read(spec.name, (0, spec.shape[0]))) for spec in specs)
    ), weights


def _known(dtype: torch.dtype | None) -> torch.dtype:
    assert dtype is not None  # `check` refuses others
    return dtype


def _open_megatron(folder: Path) -> Source:
    like = config_folder(folder)
    shape = read_shape(like)
    reader = _reader(folder)
    stored = list(stored_parameters(shape))
    _check(folder, reader, stored, shape)
    specs = [Spec(name, full_shape(name, shape), reader.dtype(s.key)) for s in stored for name in s.parameter.huggingface()]
    return Source(folder, like, shape, specs, lambda: (pair for s in stored for pair in _split(s, reader, shape)))


def config_folder(folder: Path) -> Path:
    """Folder of a Megatron checkpoint's config and tokenizer: inside it or, for a run's checkpoint, the model that the run started from."""
    if (folder / HF).is_dir():
        return folder / HF
    if (folder / SUMS).exists():  # from a run, whose recipe names the model
        path = Path(read_state(folder)["recipe"]["model"]["path"])
        if (path / "config.json").is_file():
            return path
        raise RecipeError(
            Key("model.path"),
            f" is {str(folder)!r}: its recipe's model.path {str(path)!r} has no config.json; put the model's config.json and tokenizer "
            f"into {str(folder / HF)!r}",
        )
    raise RecipeError(
        Key("model.path"),
        f" is {str(folder)!r}: it does not name its model; put the model's config.json and tokenizer into {str(folder / HF)!r}",
    )


def _reader(folder: Path) -> DistReader:
    try:
        damaged = damaged_files(folder) if (folder / SUMS).exists() else []
    except (OSError, ValueError) as error:
        damaged = [f"{SUMS} cannot be read ({error})"]
    try:
        if damaged:
            raise ValueError("; ".join(damaged))
        return DistReader(folder)
    except ValueError as error:
        raise RecipeError(Key("model.path"), f" is {str(folder)!r}: the checkpoint is damaged: {error}; copy or convert it again") from None


def _check(folder: Path, reader: DistReader, stored: list[Stored], shape: Shape) -> None:
    """Raise RecipeError unless the checkpoint's tensors fit the config; an optimizer's tensors are ignored."""
    wanted = {s.key: s for s in stored}
    keys = reader.keys()
    wrong = [f"missing {key}" for key in wanted if key not in keys]
    wrong += [f"unknown {key}" for key in sorted(keys - set(wanted)) if not key.startswith("optimizer.")]
    for key in sorted(keys & set(wanted)):
        expected, found, kind = wanted[key].size, reader.size(key), wanted[key].parameter.rule.kind
        padded = kind == "vocab" and len(found) == len(expected) and found[0] >= shape.vocab and found[1:] == expected[1:]
        if found != expected and not padded:
            wrong.append(f"{key} is {list(found)}, config.json says {list(expected)}")
    if wrong:
        raise RecipeError(Key("model.path"), f" is {str(folder)!r}: its tensors do not fit its config.json: {'; '.join(wrong)}")


def _split(stored: Stored, reader: DistReader, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """A parameter's Hugging Face tensors, as views if they are contiguous in it."""
    whole = reader.read(stored.key, stored.index)
    if not is_finite(whole):
        raise not_finite(reader.folder, stored.parameter.name)
    parts = sorted(pieces(stored.parameter, shape, 1, 0), key=lambda part: part.rows)
    for name in stored.parameter.huggingface():
        mine = [whole[part.at : part.at + part.rows[1] - part.rows[0]] for part in parts if part.name == name]
        yield name, mine[0] if len(mine) == 1 else torch.cat(mine)
