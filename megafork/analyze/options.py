"""Options of `megafork analyze`."""

from __future__ import annotations

from dataclasses import dataclass

from megafork.options import SampleOptions, argument, option
from megafork.recipe import RecipeError


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(SampleOptions):
    """Options of an analysis. Raises RecipeError, naming the option, for invalid values."""

    model: str = argument("Whose responses are analysed; as for eval.", metavar="MODEL_OR_RUN")
    prompts: str = option(help="A .jsonl or .parquet file, or another form of a recipe's data.train.")
    out: str = option(help="Folder of responses, entropies and results.")
    against: tuple[str, ...] = option(
        (), "[LABEL=]MODEL compared on the same responses, the base first; may be repeated.", unset="a run's base and checkpoints"
    )
    samples: int = option(1, "Responses per prompt.")
    temperature: float = option(1.0, "Temperature of sampling and entropies.")
    rho: float = option(0.2, "Share of positions that count as forks in the overlap.")
    min_count: int = option(100, "Tokens that occur less often are not ranked.")
    tp: int = option(1, "Tensor-parallel size of vLLM and Megatron.")
    pp: int = option(1, "Pipeline-parallel size of Megatron.")
    cp: int = option(1, "Context-parallel size of Megatron.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("samples", "min_count", "tp", "pp", "cp")
        if not 0 < self.rho <= 1:
            raise RecipeError(f"--rho is {self.rho}: must be above 0 and at most 1")
        if not 0.01 <= self.temperature <= 100:
            raise RecipeError(f"--temperature is {self.temperature}: must be between 0.01 and 100; greedy tokens have no entropy")
        if self.ranks is not None and self.ranks % self.model_size:
            raise RecipeError(f"--ranks is {self.ranks}, not a multiple of --tp x --pp x --cp = {self.model_size}: choose one")

    @property
    def model_size(self) -> int:
        """Number of ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp
