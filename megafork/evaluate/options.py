"""Options of `megafork eval`."""

from __future__ import annotations

from dataclasses import dataclass

from megafork.options import SampleOptions, argument, option
from megafork.recipe import RecipeError
from megafork.rl.fork_temperature import ForkTemperature, sweep


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: at a single temperature, where 0 is greedy, or by `forks` instead."""

    temperature: float = 1.0
    top_p: float = 1.0
    forks: ForkTemperature | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 0.01 <= self.temperature <= 100):
            raise RecipeError(f"--temperature is {self.temperature}: must be 0 (greedy), or between 0.01 and 100")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"--top-p is {self.top_p}: must be above 0 and at most 1")

    def __str__(self) -> str:
        forks = self.forks
        words = f"T {self.temperature:g}" if forks is None else f"T {forks.high:g} above {forks.threshold:g} nats, {forks.low:g} elsewhere"
        return words + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 if self.forks is None else self.forks.low == self.forks.high == 0


def decodings(
    temperature: float | None, top_p: float, fork_temperature: tuple[float, float] | None, threshold: float, every: bool
) -> tuple[Decoding, ...]:
    """The decodings requested by `--temperature` (default 1), `--fork-temperature LOW HIGH`, or `--sweep`, the paper's grid.

    `threshold`: `--fork-threshold`, in nats. Raises RecipeError if they contradict each other.
    """
    given = {"--temperature": temperature is not None, "--fork-temperature": fork_temperature is not None, "--sweep": every}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise RecipeError(f"{names[0]} and {names[1]} are given: each sets the decoding temperature, give one")
    if every:
        return tuple(Decoding(top_p=top_p, forks=forks) for forks in sweep(threshold))
    if fork_temperature is not None:
        return (Decoding(top_p=top_p, forks=ForkTemperature(*fork_temperature, threshold)),)
    return (Decoding(1.0 if temperature is None else temperature, top_p),)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(SampleOptions):
    """Options of an evaluation. Raises RecipeError, naming the option, for invalid values."""

    model: str = argument("A Hugging Face folder, owner/model, a run (its exported model), or one of its checkpoints.", metavar="MODEL")
    benchmarks: tuple[str, ...] = option(help="Comma-separated: NAME, NAME=SOURCE or SOURCE (as a recipe's data.train).", split=",")
    samples: int = option(16, "Responses per problem.")
    ks: tuple[int, ...] = option((), "k of pass@k and maj@k; may be repeated.", name="--k", unset="the number of samples")
    verifier: str = option("math", "exact, math, reasoning_gym, code, or FILE.py:FUNCTION.")
    tp: int = option(1, "Ranks that share a vLLM engine.")
    out: str = option("evaluations", "Folder of completions and results.")
    decodings: tuple[Decoding, ...] = (Decoding(),)
    workers: int = 0
    """Verifier processes; 0: one per core, at most 8."""
    gpu_memory_fraction: float = 0.9
    max_running: int = 256
    """Requests that an engine decodes concurrently."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("samples", "tp", "max_running")
        if not self.benchmarks or not all(self.benchmarks):
            raise RecipeError("--benchmarks names none: give some, such as aime24,aime25")
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise RecipeError(f"--k is {k} but --samples is {self.samples}: draw at least k samples, or choose k from 1 to that")
        if self.ranks is not None and self.ranks % self.tp:
            raise RecipeError(f"--tp is {self.tp}, which does not divide --ranks {self.ranks}: choose one that does")
        for decoding in self.decodings:
            if decoding.greedy and self.samples > 1:
                raise RecipeError(f"--samples is {self.samples} with greedy decoding ({decoding}): all are the same, give --samples 1")

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.ks))) or (self.samples,)
