"""Folders of models: what is in them, and changes to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TALK = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "{{ x }}", "tokenizer.model": "\x00\x01"}


def talking(folder: Path) -> Path:
    """Tokenizer files beside a model's weights."""
    for name, text in TALK.items():
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    return folder


@dataclass
class Contents:
    """All that a Hugging Face folder says."""

    tensors: dict[str, Tensor]
    texts: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Contents:
        tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        texts: dict[str, Any] = {name: (folder / name).read_text() for name in TALK if (folder / name).exists()}
        return cls(tensors, texts | {name: json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")})

    def assert_same(self, other: Contents) -> None:
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name]), name
        assert self.texts == other.texts


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
