"""Responses for a step: drawn when needed or, by engines that can, while earlier steps train."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from megafork.data.prompts import Prompt
from megafork.rollout.background import Background
from megafork.train.sampler import Collected, Evaluation, Sampler


class Prefetch:
    """Every rank creates one, and all ranks call each method together.

    If the engine draws in the background, everything is drawn in one thread per rank, in the same order on every rank; that thread uses
    only the sampler's own process group. Other engines draw when asked.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.recipe = sampler.recipe
        ahead = self.recipe.rollout.staleness
        assert sampler.engine.draws_in_background or not ahead, "rollout.staleness needs an engine that draws in the background"
        self._begun: dict[int, Future[Collected]] = {}
        self._background = Background()

    def collect(self, step: int) -> Collected:
        """The responses of `step`; drawing for the next `rollout.staleness` steps is started.

        The weights of step - 1 are loaded by now, so a token of step s is sampled by those of step s - 1 - staleness or newer ones.
        """
        engine = self.sampler.engine
        if not engine.draws_in_background:
            return self.sampler.collect(step)
        for later in range(step, min(step + self.recipe.rollout.staleness, self.recipe.train.steps) + 1):
            if later not in self._begun:
                self._begun[later] = self._background.begin(partial(self.sampler.collect, later))
        return engine.attend(self._begun.pop(step))

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """The sampler's `evaluate`, with the current weights, after the steps that are being drawn."""
        engine = self.sampler.engine
        if not engine.draws_in_background:
            return self.sampler.evaluate(prompts)
        return engine.attend(self._background.begin(partial(self.sampler.evaluate, prompts)))
