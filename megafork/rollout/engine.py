"""The interface of a roll-out engine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from megafork.recipe import RecipeError
from megafork.rl.fork_temperature import ForkTemperature

Weights = Iterable[tuple[str, Tensor]]
"""A whole model: (Hugging Face name, full-shape tensor), each tensor once. The tensors are fresh, so the receiver may keep them."""
Memory = Literal["weights", "kv_cache"]
"""What an engine that sleeps has no memory for."""
_T = TypeVar("_T")
Progress = Callable[[Callable[[], str]], None]
"""Receives a function that describes a roll-out's progress in words. The description must not change while nothing is drawn."""


def unheard(state: Callable[[], str]) -> None:
    """A `Progress` that ignores every report."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. In training top_p stays 1, because the trainer's log-probs are under the full distribution."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    """Token ids that end a response (and are part of it)."""
    forks: ForkTemperature | None = None
    """Entropy-dependent temperatures that replace `temperature`; each log-prob of a completion is then at its token's temperature."""
    entropies: bool = False
    """Whether completions carry each token's entropy at `temperature`. Not with `forks`."""


@dataclass(frozen=True)
class Request:
    """One response to draw. Only the seed determines its randomness, so runs are reproducible whatever else the engine does."""

    prompt: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """A drawn response: its tokens, their log-probs at the sampling temperature, whether it was truncated at max_tokens, and the version
    of the weights (see `refit`) that generated each token. If asked for, the entropy in nats of each token's distribution at that
    temperature; else empty."""

    tokens: list[int]
    log_probs: list[float]
    truncated: bool
    versions: list[int]
    entropies: list[float] = field(default_factory=list)
    routing: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int16), compare=False)
    """int16 [prompt + response - 1, layers, k], the experts chosen for each token that the model was fed, 0 in dense layers; empty, of one
    dimension, if the engine was not asked."""

    def __post_init__(self) -> None:
        if not math.isfinite(sum(self.log_probs) + sum(self.entropies)):
            raise RecipeError(
                "model.path: the model's log-probs are not numbers (NaN or infinite), so its weights are damaged or its activations "
                "overflow: restore the weights, try precision.dtype=fp32, or, where training made them, a smaller optimizer.lr"
            )


Ended = Callable[[int, Completion], None]
"""Called with each completion as it ends: (index of its request, completion)."""


class Engine(Protocol):
    """A roll-out engine as built by `train.engines.build_engine`: it owns the source of its weights and reads it at every `refit`.

    Every rank of the world constructs one, and all ranks call each method together with the same arguments. Subclasses inherit the
    defaults below.
    """

    rank: int
    """This rank's number within its engine; rank 0 has the completions."""
    number: int
    """This engine's number."""
    engines: int
    """Number of engines, which share the prompts."""
    draws_in_background: bool = False
    """Whether `generate` may be called in a thread while the ranks train and `refit`. The step then waits in `attend`."""
    progress: Progress = staticmethod(unheard)
    """Called by `generate` about once a second while it draws, on rank 0 at least, so that a batch script can tell work from a hang. Set
    by the listener."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, ended: Ended | None = None) -> list[Completion]:
        """One completion per request, in order, on the engine's rank 0. Log-probs are under the distribution that was sampled: at the
        sampling temperature, or at each token's fork temperature. Engines that can do so call `ended` as each completion ends."""
        ...

    def refit(self, version: int) -> None:
        """Load the source's current weights; tokens generated afterwards are attributed to `version`."""
        ...

    def refit_metrics(self) -> dict[str, float]:
        """Metrics of the last refit, named `refit/...`; the same on every rank."""
        return {}

    def attend(self, work: Future[_T]) -> _T:
        """Wait for work in another thread that calls `generate`. Every rank waits for its own part."""
        return work.result()

    def sleep(self) -> None:
        """Release accelerator memory until `wake`."""
        return

    def wake(self, part: Memory) -> None:
        """Undo `sleep` for one part: first for the weights, which are undefined until the `refit` that follows, and after it for the KV
        cache, so that the refit's buckets have its memory."""
        return

    def close(self) -> None:
        """Shut down the engine; the process groups stay up."""
        return


def request_seed(*identity: int) -> int:
    """A 63-bit seed derived from a request's identity, for example (run seed, step, prompt, sample)."""
    digest = hashlib.blake2b(",".join(map(str, identity)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
