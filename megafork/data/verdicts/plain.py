"""Values of Python's built-in types as JSON, so that a program's return value reaches the judge as data. Other objects are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

_KINDS: dict[str, Callable[[Iterable[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}


def dumps(value: Any) -> str:
    """Encode a value. Raises TypeError if it is not plain, RecursionError if it is nested too deeply or contains itself."""
    return json.dumps(_encode(value))


def loads(text: bytes) -> Any:
    """Decode untrusted text. Raises ValueError, TypeError, LookupError or RecursionError if it is not output of `dumps`."""
    return _decode(json.loads(text))


def _encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [_encode(element) for element in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(element)] for key, element in value.items()]}
    for name in ("tuple", "set", "frozenset"):
        if isinstance(value, _KINDS[name]):  # type: ignore[arg-type]
            return {name: [_encode(element) for element in value]}
    for base in (int, float, str):  # a subclass, such as IntEnum
        if isinstance(value, base):
            return base(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():  # a number of NumPy, equal to Python's
        return _encode(value.item())
    raise TypeError(type(value).__name__)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(element) for element in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    return _KINDS[kind](_decode(element) for element in content)
