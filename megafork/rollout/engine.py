"""What a trainer needs of a roll-out engine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from megafork.recipe import RecipeError
from megafork.rl.fork_temperature import ForkTemperature

Weights = Iterable[tuple[str, Tensor]]
"""A whole model: (Hugging Face name, tensor of its full shape), each tensor once and fresh, so that the receiver may keep it."""
_T = TypeVar("_T")
Progress = Callable[[Callable[[], str]], None]
"""Hears how far a roll-out is, from what says it in words: a state that stays the same while nothing is drawn."""


def unheard(state: Callable[[], str]) -> None:
    """The `Progress` that nobody listens to."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. In training top_p stays 1: the trainer's log-probs are those of the whole distribution."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    """Token ids that end a response (and belong to it)."""
    forks: ForkTemperature | None = None
    """Temperatures by entropy, in the place of `temperature`; the log-probs of a completion are then at its tokens' temperatures."""


@dataclass(frozen=True)
class Request:
    """One response to draw. The seed alone decides its randomness, so a run repeats whatever else the engine does."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """A drawn response: its tokens, their log-probs at the sampling temperature, whether it was cut at max_tokens, and which weights
    (`refit`'s version) wrote each token."""

    tokens: list[int]
    log_probs: list[float]
    truncated: bool
    versions: list[int]

    def __post_init__(self) -> None:
        if not math.isfinite(sum(self.log_probs)):
            raise RecipeError(
                "model.path: the model's log-probs are not numbers (NaN or infinite), so its weights are damaged or its activations "
                "overflow: restore the weights, try precision.dtype=fp32, or, where training made them, a smaller optimizer.lr"
            )


Ended = Callable[[int, Completion], None]
"""Told of each completion as it ends: its request's place, and itself."""


class Engine(Protocol):
    """A roll-out engine, as `train.engines.build_engine` makes it: with the source of its weights, which it reads at every `refit`.

    Every rank of the world makes one together, and all call each method together and with the same arguments. What a subclass leaves out
    is as here.
    """

    rank: int
    """This rank's among the engine's; 0 has the completions."""
    number: int
    """Which of the engines this is."""
    engines: int
    """How many there are: each takes its share of the prompts."""
    draws_in_background: bool = False
    """Whether `generate` may be called in a thread while the ranks train and `refit`. The step then waits in `attend`."""
    progress: Progress = staticmethod(unheard)
    """Called by `generate` every second or so while it draws, on rank 0 at least; by it a batch script tells work from a hang. Set by
    whoever listens."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, ended: Ended | None = None) -> list[Completion]:
        """One completion per request, in order, on the engine's rank 0. Their log-probs are those of the distribution drawn from: at the
        sampling temperature, or at that of each token's fork. An engine that can calls `ended` with each completion as soon as it ends."""
        ...

    def refit(self, version: int) -> None:
        """Take over the weights that the source has now; tokens are from then on written by `version`."""
        ...

    def refit_metrics(self) -> dict[str, float]:
        """What the last refit cost, as `refit/...`; the same on every rank."""
        return {}

    def attend(self, work: Future[_T]) -> _T:
        """Wait for work that was begun in a thread and calls `generate`. Every rank waits for its own part."""
        return work.result()

    def sleep(self) -> None:
        """Free the accelerator's memory until `wake`."""
        return

    def wake(self) -> None:
        """Undo `sleep`. The weights may be undefined until the next `refit`."""
        return

    def close(self) -> None:
        """End; the process groups stay up."""
        return


def request_seed(*identity: int) -> int:
    """A 63-bit seed from what identifies a request, for example (run seed, step, prompt, sample)."""
    digest = hashlib.blake2b(",".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
