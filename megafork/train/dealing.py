"""Deals prompts to engines by the expected length of their responses, so that no engine waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from megafork.data.prompts import Prompt


class Dealer:
    """Remembers how long each prompt's responses were. Every rank creates one and feeds it the same, so all deal identically."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        """Mean tokens per response to each prompt, the last time that it was drawn."""

    def deal(self, prompts: Sequence[Prompt], engines: int) -> list[list[int]]:
        """For each engine, indices into `prompts`. Longest expected responses first, each to the engine with the fewest tokens so far.

        A prompt not drawn before counts as the average; if none was, all are dealt in turn.
        """
        average = sum(self._seen.values()) / len(self._seen) if self._seen else 1.0
        expected = [self._seen.get(prompt.index, average) for prompt in prompts]
        loads = [(0.0, 0, engine) for engine in range(engines)]
        dealt: list[list[int]] = [[] for _ in range(engines)]
        for place in sorted(range(len(prompts)), key=lambda place: (-expected[place], place)):
            load, count, engine = heapq.heappop(loads)
            dealt[engine].append(place)
            heapq.heappush(loads, (load + expected[place], count + 1, engine))
        return dealt

    def learn(self, prompt: Prompt, tokens: Iterable[int]) -> None:
        """Remember the lengths of a prompt's responses."""
        lengths = list(tokens)
        if lengths:
            self._seen[prompt.index] = sum(lengths) / len(lengths)

    def state(self) -> dict[int, float]:
        """For a checkpoint."""
        return dict(self._seen)

    def restore(self, state: dict[int, float]) -> None:
        self._seen = dict(state)
