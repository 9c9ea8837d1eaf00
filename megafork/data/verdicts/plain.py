"""Values of Python's own types as JSON: what a program returned reaches the judge as data. No object of another type does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

_KINDS: dict[str, Callable[[Iterable[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}


def dumps(value: Any) -> str:
    """Raises TypeError for what is not plain, RecursionError for what is nested too deeply or contains itself."""
    return json.dumps(_encode(value))


def loads(text: bytes) -> Any:
    """Of what may be anything. Raises ValueError, TypeError, LookupError or RecursionError if `dumps` has not written it."""
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
    for base in (int, float, str):  # a subclass, as of IntEnum
        if isinstance(value, base):
            return base(value)
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
