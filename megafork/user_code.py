"""Functions chosen by name: a built-in one, or the user's own as FILE.py:FUNCTION. Imports nothing heavy: verifier processes use it."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from megafork.did_you_mean import did_you_mean


def split(name: str) -> tuple[Path, str]:
    """FILE.py, with `~` expanded, and FUNCTION of `FILE.py:FUNCTION`."""
    path, _, function = name.rpartition(":")
    return Path(os.path.expanduser(path)), function


def name_problem(name: str, built_in: Iterable[str]) -> str | None:
    """Why `name` is neither built in nor a function of an existing file, and the fix; None if it may be. Imports no file."""
    known = list(built_in)
    path, function = split(name)
    if name in known:
        return None
    if path.suffix != ".py" or not function.isidentifier():
        return did_you_mean(name, known, f"known are {', '.join(known)}, or give FILE.py:FUNCTION")
    return None if path.is_file() else "no such file; give a path relative to the working directory"


def import_file(path: Path, name: str) -> ModuleType:
    """The file as the module `name`. Raises whatever the file raises."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up their module
    spec.loader.exec_module(module)
    return module
