"""Models as named on the command line: a Hugging Face folder, `owner/model` on the hub, a run, or one of a run's checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from megafork.convert.sources import config_folder, open_source
from megafork.data.hub import local_model
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.recipe import RecipeError, calling
from megafork.shape import Shape, read_dtype, read_shape, refuse_adapter
from megafork.weights.checkpoint import complete
from megafork.weights.checksums import SUMS, sum_of
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.mapping import huggingface_shapes

AS_OPTIONS = {
    "model.path": "MODEL",
    "parallel.tp": "--tp",
    "parallel.pp": "--pp",
    "parallel.cp": "--cp",
    "rollout.tp": "--tp",
    "reward.verifier": "--verifier",
    "data.template": "--template",
    "data.chat_template_args": "--chat-template-args",
    "data.add_bos": "--add-bos",
    "data.columns": "--columns",
}
"""Names of recipe keys in commands that take a model, for `calling`."""
_READS_AT_ONCE = 4
_ALSO = ("config.json", "tokenizer.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class NamedModel:
    """A named model's files."""

    name: str
    """The name as given."""
    folder: Path
    """Folder of config.json, the tokenizer and, unless in a checkpoint, the weights."""
    checkpoint: Path | None = None
    """The checkpoint with the weights, in Megatron's format, or None."""

    def check(self) -> Shape:
        """The model's shape. Raises RecipeError if the weights do not fit it or are damaged."""
        shape = read_shape(self.folder)
        if self.checkpoint is None:
            HuggingFaceWeights(self.folder).check(shape)
        else:
            open_source(self.checkpoint, keep=True)
        return shape

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RecipeError if it does not fit the model, or names no end token."""
        tokenizer = load_tokenizer(str(self.folder))
        tokenizer.check(read_shape(self.folder).vocab, f"MODEL is {self.name!r}")
        return tokenizer

    @property
    def dtype(self) -> Literal["fp32", "bf16"]:
        """The dtype to compute in: fp32 if set in config.json, else bf16."""
        return "fp32" if read_dtype(self.folder) == "float32" else "bf16"

    def digest(self) -> str:
        """16 hex digits of SHA-256 over every byte of the weights, config.json and the tokenizer.

        Nothing is skipped: a few steps of bf16 training leave most weights unchanged, so a sample of the bytes could miss the changes.
        """
        weights = [*self.folder.glob("*.safetensors")]
        if self.checkpoint is not None:  # sums, if it has any, stand for the files that were checked against them
            summed = (self.checkpoint / SUMS).exists()
            weights = [self.checkpoint / SUMS] if summed else [file for file in self.checkpoint.iterdir() if file.is_file()]
        files = sorted([*weights, *(self.folder / name for name in _ALSO if (self.folder / name).exists())])
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            sums = dict(zip([file.name for file in files], threads.map(sum_of, files), strict=True))
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by Hugging Face name, one tensor at a time, which the caller may keep. Raises RecipeError for NaN."""
        with calling(AS_OPTIONS):
            if self.checkpoint is not None:
                yield from ((name, tensor.clone()) for name, tensor in open_source(self.checkpoint, keep=True).read())
                return
            source = HuggingFaceWeights(self.folder)
            for name, shape in huggingface_shapes(read_shape(self.folder)).items():
                yield name, source.read(name, (0, shape[0]))


def find_model(name: str) -> NamedModel:
    """The model with this name; for a run, its exported model or else its newest checkpoint. Raises RecipeError."""
    folder = Path(local_model(name))
    refuse_adapter(folder, f"MODEL is {name!r}")
    if not os.path.isdir(folder):
        raise RecipeError(f"MODEL is {name!r}: no such folder; give a Hugging Face folder, `owner/model`, a run or one of its checkpoints")
    if (folder / "config.json").exists():
        return NamedModel(name, folder)
    if (folder / "metadata.json").exists():  # Megatron's
        return NamedModel(name, config_folder(folder), folder)
    if (folder / "hf/config.json").exists():
        return NamedModel(name, folder / "hf")
    checkpoints = complete(folder / "checkpoints")
    if checkpoints:
        return NamedModel(name, config_folder(checkpoints[-1][1]), checkpoints[-1][1])
    raise RecipeError(
        f"MODEL is {name!r}: it has neither a config.json nor checkpoints; give a Hugging Face folder, `owner/model`, a run or one of its "
        "checkpoints"
    )
