"""Work in a thread of its own, one piece after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class Background:
    """Unlike an executor's, its thread is a daemon: a process that fails does not wait for it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, work: Callable[[], _T]) -> Future[_T]:
        """Have it done after what was begun before."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
                future.set_exception(error)

        self._waiting.put(run)
        return future

    def _work(self) -> None:
        while True:
            self._waiting.get()()
