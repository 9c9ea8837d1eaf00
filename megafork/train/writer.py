"""Writes a run's files about finished steps in a thread, while the run goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from megafork.files import full_disk
from megafork.rollout.background import Background
from megafork.train.stopped import Stopped

WAITING = 2
"""Pieces of work that may be unfinished; another one waits until the oldest is done. This bounds the memory."""


class _Work(NamedTuple):
    what: str
    done: Future[None]


class Writer:
    """One thread, which does what it is given in order. Nothing here is collective, but work may be, if all ranks give it in the same
    order and it uses a process group of its own.

    A failure is raised by the next call of either method: as it is if the disk is full, as Stopped for other errors of the file system.
    """

    def __init__(self) -> None:
        self._background = Background()
        self._begun: deque[_Work] = deque()

    def begin(self, what: str, work: Callable[[], None]) -> None:
        """Queue `work`, which writes `what`."""
        while self._begun and (self._begun[0].done.done() or len(self._begun) >= WAITING):
            _end(self._begun.popleft())
        self._begun.append(_Work(what, self._background.begin(work)))

    def settle(self) -> None:
        """Wait until everything is written."""
        while self._begun:
            _end(self._begun.popleft())


def _end(work: _Work) -> None:
    try:
        work.done.result()
    except OSError as error:
        if full_disk(error):
            raise
        raise Stopped(f"{work.what} can't be written ({error}): mend it, and the same command continues") from error
