"""Runs work in a dedicated thread, one item at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class Background:
    """A single-thread executor whose thread is a daemon, so a failing process does not wait for it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, work: Callable[[], _T]) -> Future[_T]:
        """Queue `work` behind everything begun earlier."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised again by `Future.result`
                future.set_exception(error)

        self._waiting.put(run)
        return future

    def _work(self) -> None:
        while True:
            self._waiting.get()()
