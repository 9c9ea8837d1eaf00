"""The record of a rehearsal: events, with the place in the code that caused them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import megafork

Kind = Literal["wait", "copy", "pageable", "refused"]
"""wait: the host waits for the device (as in a synchronous copy). copy: an asynchronous copy from or to pinned memory. pageable: a copy
requested as asynchronous, but whose host memory is not pinned. refused: an operation that raises on CUDA."""
_HERE = Path(__file__).parent
_MEGATRON = Path(next(iter(find_spec("megatron").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
_CODE = (Path(megafork.__file__).parent, _MEGATRON, _HERE.parent)
_THROUGH = str(Path(megafork.__file__).parent / "parallel/to_device.py")
"""Events in this file are attributed to its callers."""
_LAYER = str(_MEGATRON / "core/transformer")


@dataclass(frozen=True)
class Event:
    kind: Kind
    what: str
    place: str
    """file:line of the innermost frame in megafork, megatron or a test."""
    in_layer: bool
    """Within a transformer layer, forward or recomputed."""


class Refused(RuntimeError):
    """The error that CUDA, NCCL or torch would raise."""


@dataclass
class Ledger:
    events: list[Event] = field(default_factory=list)

    def note(self, kind: Kind, what: str) -> None:
        self.events.append(Event(kind, what, *_place()))

    def refuse(self, reason: str, error: type[Exception] = Refused) -> Exception:
        """The exception to raise."""
        place, in_layer = _place()
        self.events.append(Event("refused", reason, place, in_layer))
        return error(f"{place}: {reason}")

    @contextmanager
    def during(self) -> Iterator[Ledger]:
        """Yield a separate ledger, which gets the events of the with block when it ends."""
        part, start = Ledger(), len(self.events)
        try:
            yield part
        finally:
            part.events = self.events[start:]

    def of(self, *kinds: Kind) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    def table(self) -> str:
        """Lines of `count kind place what`, most frequent first."""
        counted = Counter(self.events).most_common()
        return "\n".join(f"{n:5} {e.kind:8} {e.place}  {e.what}{'  (in a layer)' if e.in_layer else ''}" for e, n in counted)


def _place() -> tuple[str, bool]:
    place, in_layer = "", False
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not place and (short := _short(name)):
            place = f"{short}:{frame.f_lineno}"
        in_layer = in_layer or (name.startswith(_LAYER) and frame.f_code.co_name == "forward")
        frame = frame.f_back  # type: ignore[assignment]
    return place, in_layer


def _short(file: str) -> str | None:
    path = Path(file)
    if path.is_relative_to(_HERE) or file == _THROUGH:
        return None
    root = next((root for root in _CODE if path.is_relative_to(root)), None)
    return str(path.relative_to(root.parent)) if root else None
