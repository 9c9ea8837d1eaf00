"""What a trainer needs of a roll-out engine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megafork.recipe import RecipeError
from megafork.rl.fork_temperature import ForkTemperature

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

    @property
    def at(self) -> dict[str, Any]:
        """What of vLLM's SamplingParams says the temperature."""
        return {"temperature": self.temperature} if self.forks is None else {"temperature": 1.0, "extra_args": self.forks.arguments}


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


class Engine(Protocol):
    """A roll-out engine. All ranks of the engine call each method together and with the same arguments."""

    rank: int
    """This rank's among the engine's; 0 has the completions."""
    number: int
    """Which of the engines this is."""
    engines: int
    """How many there are: each takes its share of the prompts."""
    progress: Progress
    """Called by `generate` every second or so while it draws, on rank 0 at least; by it a batch script tells work from a hang."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion a request, in order."""
        ...

    def refit(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over new weights: (Hugging Face name, whole tensor) in any order, every tensor of the model once."""
        ...

    def sleep(self) -> None:
        """Free the accelerator's memory until `wake` (without effect on the CPU)."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def request_seed(*identity: int) -> int:
    """A 63-bit seed from what identifies a request, for example (run seed, step, prompt, sample)."""
    digest = hashlib.blake2b(",".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
