"""Hugging Face model folders: checked, read by slices, and written in shards, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megafork.recipe import RecipeError
from megafork.shape import Shape
from megafork.weights.mapping import huggingface_shapes

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class HuggingFaceWeights:
    """The tensors of a model folder (model.safetensors, or shards with an index), read lazily by rectangle.

    Opening reads headers only. Raises RecipeError for a folder without weights, a missing shard, a damaged file, or an index that its
    files do not bear out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        placed = self._locate()
        files = {file: safe_file(file) for file in set(placed.values())}
        held = {file: set(opened.keys()) for file, opened in files.items()}
        absent = sorted(name for name, file in placed.items() if name not in held[file])
        if absent:
            raise RecipeError(
                f"model.path is {str(folder)!r}: its index puts {absent[0]} into {placed[absent[0]].name}, which does not hold it; "
                "index and shards are of different models: download them again"
            )
        self._files = {name: files[file] for name, file in placed.items()}

    def _locate(self) -> dict[str, Path]:
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if index.exists():
            names = self._read_index(index)
        elif single.exists():
            with safe_file(single) as file:
                names = dict.fromkeys(file.keys(), single)
        else:
            raise RecipeError(
                f"model.path is {str(self.folder)!r}: it has no model.safetensors and no model.safetensors.index.json; "
                "give a folder with weights in safetensors format"
            )
        missing = sorted({file.name for file in names.values() if not file.exists()})
        if missing:
            raise RecipeError(
                f"model.path is {str(self.folder)!r}: its index names {', '.join(missing)}, which are not there; download them again"
            )
        return names

    def _read_index(self, index: Path) -> dict[str, Path]:
        try:
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecipeError(
                f"model.path is {str(self.folder)!r}: its {index.name} is not JSON with a weight_map of tensors to files; download it again"
            ) from None

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """None for a dtype that megafork does not train from."""
        return _DTYPES.get(self._files[name].get_slice(name).get_dtype())

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Tensor:
        """A rectangle of one tensor on the CPU, in the file's dtype; only its bytes are read."""
        lazy = self._files[name].get_slice(name)
        return lazy[rows[0] : rows[1]] if columns is None else lazy[rows[0] : rows[1], columns[0] : columns[1]]

    def check(self, shape: Shape) -> None:
        """Compare names, shapes and dtypes with what config.json says. Raises RecipeError that lists every difference."""
        wanted = huggingface_shapes(shape)
        wrong = [f"missing {name}" for name in wanted if name not in self._files]
        ignorable = {"lm_head.weight"} if shape.tied else set()  # some tools write the tied head twice
        for name in sorted(self._files):
            if name in ignorable or name.endswith("rotary_emb.inv_freq"):
                continue
            if name not in wanted:
                wrong.append(f"unknown {name}")
            elif self.shape(name) != wanted[name]:
                wrong.append(f"{name} is {list(self.shape(name))}, config.json says {list(wanted[name])}")
            elif self.dtype(name) is None:
                wrong.append(f"{name} has dtype {self._files[name].get_slice(name).get_dtype()}, known are {', '.join(_DTYPES)}")
        if wrong:
            listed = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise RecipeError(f"model.path is {str(self.folder)!r}: its tensors do not fit its config.json: {listed}")


def safe_file(file: Path):  # type: ignore[no-untyped-def]  # safetensors has no types
    """Open a safetensors file; RecipeError when it is truncated or not one."""
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{file.name} in {str(file.parent)!r} is damaged or truncated ({error}): download or export it again") from None


def write_folder(
    target: Path, tensors: Iterable[tuple[str, Tensor]], *, like: Path, dtype: torch.dtype | None = None, shard_bytes: int = 4 << 30
) -> None:
    """Write a Hugging Face folder: `tensors` in shards of about `shard_bytes`, config and tokenizer copied from the folder `like`.

    Written under a temporary name and renamed when complete: an interrupted write leaves the old folder whole (killed between the two
    renames of the exchange, it leaves it as `<target>.old`). `dtype` None keeps each tensor's own.
    """
    temporary = target.with_name(target.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    written = _write_shards(temporary, tensors, dtype, shard_bytes)
    config = json.loads((like / "config.json").read_text())
    config.pop("torch_dtype", None)  # the key's older name
    config["dtype"] = str(written).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in _COMPANIONS:
        if (like / name).exists():
            shutil.copyfile(like / name, temporary / name)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)  # of a writer that was killed; the new folder is complete by now
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int) -> torch.dtype:
    """Returns the dtype of the tensors written."""
    where: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    count = size = total = 0

    def flush() -> None:
        nonlocal shard, count, size
        save_file(shard, folder / f"shard-{count}.safetensors", metadata={"format": "pt"})
        shard, count, size = {}, count + 1, 0

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[name], where[name] = tensor, count
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if count == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return tensor.dtype
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for n, file in enumerate(files):
        (folder / f"shard-{n}.safetensors").rename(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: files[n] for name, n in where.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return tensor.dtype
