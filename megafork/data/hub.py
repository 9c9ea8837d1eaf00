"""Models named by their repository on the Hugging Face hub."""

from __future__ import annotations

import os

from megafork.recipe import Key, RecipeError

_WANTED = ("*.json", "*.jinja", "*.txt", "*.model")
_TWICE = "consolidated*"
"""Mistral's repositories have the same weights again under this name."""


def is_hub_name(name: str) -> bool:
    """Whether `name` is `owner/model` or `model`, unless `owner` is a local folder: then a path was meant."""
    owner, _, model = name.rpartition("/")
    return "/" not in owner and not name.startswith((".", "/", "~")) and bool(model) and not (owner and os.path.exists(owner))


def local_model(name: str, *, weights: bool = True) -> str:
    """The folder of a model: `name` itself, with `~` expanded, or for `owner/model` its folder in the hub's cache, downloaded if missing.

    `weights`: whether they are needed too.

    Raises RecipeError when the hub does not have it or can't be reached.
    """
    name = os.path.expanduser(name)
    if os.path.isdir(name) or "/" not in name or not is_hub_name(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=[*_WANTED, *(["*.safetensors"] if weights else [])], ignore_patterns=_TWICE)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            Key("model.path"),
            f" is {name!r}: no such folder, and the hub did not provide it ({reason}): give a Hugging Face model folder, or download "
            f"it with network access by `hf download {name}`",
        ) from None
