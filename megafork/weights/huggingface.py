"""Hugging Face model folders: checks them, reads slices of tensors, and writes shards one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megafork.files import LFS_POINTER
from megafork.recipe import Key, RecipeError
from megafork.shape import Shape, read_config
from megafork.weights.checksums import sync, sync_name
from megafork.weights.mapping import huggingface_shapes
from megafork.weights.shards import CODES, INDEX, Spec, shard_names, write_file, write_index

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BAND = 64 << 20
"""Bytes of a tensor compared at a time."""
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that a chat-ready model folder may hold in addition to config.json and the weights."""


class HuggingFaceWeights:
    """The tensors of a model folder (model.safetensors, or shards with an index), read lazily by rectangle.

    The constructor reads headers only. It raises RecipeError for a folder without weights, a missing shard, a damaged file, an index that
    disagrees with its files, or a single file beside an index of other files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        placed = self._locate()
        self._tensors: dict[str, _Header] = {}
        for file in sorted(set(placed.values())):
            self._tensors |= _headers(file)
        absent = sorted(name for name, file in placed.items() if name not in self._tensors or self._tensors[name].file != file)
        if absent:
            raise RecipeError(
                Key("model.path"),
                f" is {str(folder)!r}: its index puts {absent[0]} into {placed[absent[0]].name}, which does not hold it; "
                "index and shards are of different models: download them again",
            )
        self._tensors = {name: self._tensors[name] for name in placed}

    def _locate(self) -> dict[str, Path]:
        single, index = self.folder / "model.safetensors", self.folder / INDEX
        if index.exists():
            names = self._read_index(index)
            if single.exists() and set(names.values()) != {single}:
                raise RecipeError(
                    Key("model.path"),
                    f" is {str(self.folder)!r}: it has a {single.name}, which transformers loads, beside {index.name} with "
                    "other files: delete the one that is not the model",
                )
        elif single.exists():
            with safe_file(single) as file:
                names = dict.fromkeys(file.keys(), single)
        else:
            raise RecipeError(
                Key("model.path"),
                f" is {str(self.folder)!r}: it has no model.safetensors and no model.safetensors.index.json; "
                "give a folder with weights in safetensors format",
            )
        missing = sorted({file.name for file in names.values() if not file.exists()})
        if missing:
            raise RecipeError(
                Key("model.path"),
                f" is {str(self.folder)!r}: its index names {', '.join(missing)}, which are not there; download them again",
            )
        return names

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RecipeError(
                Key("model.path"),
                f" is {str(self.folder)!r}: its {index.name} is not JSON with a weight_map of tensors to files; download it again",
            ) from None

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype, or None for one that megafork cannot train from."""
        return _DTYPES.get(self._tensors[name].dtype)

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Tensor:
        """A rectangle of one tensor on the CPU, in the file's dtype; only its bytes are read.

        It may be a view of the mapped file, whose pages count towards this process's memory as long as the tensor lives. Raises
        RecipeError if it holds NaN or infinity.
        """
        lazy = safe_file(self._tensors[name].file).get_slice(name)
        tensor = lazy[rows[0] : rows[1]] if columns is None else lazy[rows[0] : rows[1], columns[0] : columns[1]]
        if not is_finite(tensor):
            raise not_finite(self.folder, name)
        return tensor

    def check(self, shape: Shape, *, dtype: torch.dtype | None = None, listed: int | None = 8) -> None:
        """Check names, shapes and dtypes against config.json. Raises RecipeError listing every difference, or the first `listed`; also if
        config.json ties the head to the embedding but the files hold a head with other values, which transformers and vLLM would use.

        `dtype`: required of all tensors; None accepts any dtype that megafork trains from. If the files hold a tied head, head and
        embedding are read and compared.
        """
        wanted = huggingface_shapes(shape)
        head, embedding = (rule.tensors[0].name for rule in (shape.family.head, shape.family.embedding))
        self._refuse_other_names(embedding)
        wrong = [f"missing {name}" for name in wanted if name not in self._tensors]
        if shape.tied and head in self._tensors:  # some tools also write the tied head
            wanted[head] = wanted[embedding]
        for name in sorted(self._tensors):
            if name.endswith(shape.family.buffers):
                continue
            if name not in wanted:
                wrong.append(f"unknown {name}")
            elif self.shape(name) != wanted[name]:
                wrong.append(f"{name} is {list(self.shape(name))}, config.json says {list(wanted[name])}")
            elif self.dtype(name) is None:
                wrong.append(f"{name} has dtype {self._tensors[name].dtype}, known are {', '.join(_DTYPES)}")
            elif dtype is not None and self.dtype(name) != dtype:
                wrong.append(f"{name} has dtype {self._tensors[name].dtype}, config.json says {CODES.get(dtype, dtype)}")
        if wrong:
            shown = "; ".join(wrong[:listed]) + (f"; and {len(wrong[listed:])} more" if listed and len(wrong) > listed else "")
            raise RecipeError(Key("model.path"), f" is {str(self.folder)!r}: its tensors do not fit its config.json: {shown}")
        if shape.tied and head in self._tensors and not self._are_equal(head, embedding, shape):
            raise RecipeError(
                Key("model.path"),
                f" is {str(self.folder)!r}: config.json ties the head (tie_word_embeddings is true), but its {head} is not its "
                f"{embedding}: set it to false to train with that head, or delete {head} from the file to train without it",
            )

    def _refuse_other_names(self, embedding: str) -> None:
        """Raise RecipeError if the names of all tensors have another prefix, that of a wrapper around the model that was saved."""
        if embedding in self._tensors:
            return
        ending = ".".join(embedding.split(".")[-2:])
        other = next((name for name in sorted(self._tensors) if name.endswith(ending)), None)
        if other is not None:
            raise RecipeError(
                Key("model.path"),
                f" is {str(self.folder)!r}: its tensors do not fit its config.json: they have other names, such as {other} in place of "
                f"{embedding}: save the model itself, without what wraps it, or rename them",
            )

    def _are_equal(self, head: str, embedding: str, shape: Shape) -> bool:
        """Whether head and embedding are equal, compared band by band to bound memory."""
        band = max(1, _BAND // (4 * shape.hidden))
        bands = ((first, min(first + band, shape.vocab)) for first in range(0, shape.vocab, band))
        return all(torch.equal(*(self.read(name, rows).float() for name in (head, embedding))) for rows in bands)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. The minimum and maximum suffice, in one pass and without a tensor of flags."""
    return tensor.numel() == 0 or tensor.dtype not in _DTYPES.values() or all(map(math.isfinite, map(float, tensor.aminmax())))


def not_finite(folder: Path, name: str) -> RecipeError:
    return RecipeError(
        Key("model.path"),
        f" is {str(folder)!r}: its {name} holds NaN or infinity: the weights are of a training that broke down, give an earlier checkpoint",
    )


@dataclass(frozen=True)
class _Header:
    """A tensor's file, and its shape and dtype as given in the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _headers(path: Path) -> dict[str, _Header]:
    with safe_file(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: _Header(path, tuple(lazy.get_shape()), lazy.get_dtype()) for name, lazy in slices.items()}


def safe_file(file: Path):  # type: ignore[no-untyped-def]  # safetensors has no types
    """Open a safetensors file. Raises RecipeError if it is truncated or not a safetensors file."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        if _is_pointer(file):
            raise RecipeError(
                f"{file.name} in {str(file.parent)!r} is a Git LFS pointer, not the weights: run `git lfs pull` in the folder"
            ) from None
        raise RecipeError(f"{file.name} in {str(file.parent)!r} is damaged or truncated ({error}): download or export it again") from None


def _is_pointer(file: Path) -> bool:
    """Whether git cloned a note about the file in place of the file."""
    try:
        with file.open("rb") as content:
            return content.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def write_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder: `tensors` in shards of about `shard_bytes`, config and tokenizer copied from the folder `like`.

    Holds one shard in memory. The folder is written under a temporary name and renamed when complete, so an interrupted write leaves the
    old folder intact (as `<target>.old` if killed between the two renames of the swap). `dtype` None keeps each tensor's dtype.
    `notes`: contents of additional JSON files, by file name.
    """
    with replaced(target) as folder:
        written = _collect_shards(folder, tensors, dtype, shard_bytes)
        copy_companions(like, folder, {"dtype": str(written).removeprefix("torch.")})
        for name, note in (notes or {}).items():
            (folder / name).write_text(json.dumps(note) + "\n")


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Yield a new folder under a temporary name, which replaces `target` if the block ends without an error."""
    temporary = target.with_name(target.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    sync(temporary)
    old = target.with_name(target.name + ".old")
    _remove(old)  # left by a writer that was killed; the new folder is complete by now
    if os.path.lexists(target):
        target.rename(old)
    temporary.rename(target)
    sync_name(target)
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link to one but not what it leads to, as far as possible."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy_companions(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Copy config.json with `changes` applied, and the `COMPANIONS` that exist."""
    config = read_config(source)
    if "dtype" in changes:
        config.pop("torch_dtype", None)  # the key's older name
    (target / "config.json").write_text(json.dumps({**config, **changes}, indent=2) + "\n")
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _collect_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int) -> torch.dtype:
    """Write tensors about which nothing is known in advance, as shards with an index. Returns the last tensor's dtype."""
    written: list[list[Spec]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in shard.items()]
        write_file(folder / f"shard-{len(written)}", specs, iter(shard.items()))
        written.append(specs)
        shard.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype)
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
    flush()
    files = shard_names(len(written))
    for n, file in enumerate(files):
        (folder / f"shard-{n}").rename(folder / file)
    write_index(folder, [(file, spec) for file, specs in zip(files, written, strict=True) for spec in specs])
    return tensor.dtype
