"""The requests of one roll-out on vLLM servers: the queue of those waiting for a server, and the answers so far."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megafork.rollout.client import Server, ServerLost
from megafork.rollout.engine import Completion, Ended, Request, Sampling

TRIES = 5
"""Failures allowed for one operation on apparently healthy servers before the run ends."""


class NoServer(RuntimeError):
    """No server is left, or none fulfils its requests. Rerunning the same command continues the run."""


class Batch:
    """Each request is answered once, however often it is tried.

    `version`: the oldest weights that may answer. `ended` is called with each answer.
    """

    def __init__(self, requests: Sequence[Request], sampling: Sampling, version: int, ended: Ended | None) -> None:
        self.ended = ended
        self.requests = requests
        self.sampling = sampling
        self.version = version
        self.finished = asyncio.Event()
        self._answers: list[Completion | None] = [None] * len(requests)
        self._tries = [0] * len(requests)
        self.left = len(requests)
        """Requests without an answer."""
        self._waiting: asyncio.Queue[int] = asyncio.Queue()
        for number in range(len(requests)):
            self._waiting.put_nowait(number)
        if not requests:
            self.finished.set()

    @property
    def completions(self) -> list[Completion]:
        """In the order of the requests, once all are answered."""
        return [answer for answer in self._answers if answer is not None]

    async def answer_next(self, server: Server) -> None:
        """Send the next waiting request to a server. If there is no answer, for whatever reason, it is queued again."""
        number = await self._waiting.get()
        self._tries[number] += 1
        try:
            answer = self._answers[number] = await server.complete(self.requests[number], self.sampling, self.version)
        except ServerLost as error:
            if self._tries[number] == TRIES:
                raise NoServer(f"one request was tried {TRIES} times, the last time: {error}") from error
            raise
        finally:
            if self._answers[number] is None:
                self._waiting.put_nowait(number)
        if self.ended is not None:
            self.ended(number, answer)
        self.left -= 1
        if self.left == 0:
            self.finished.set()
