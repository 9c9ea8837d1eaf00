"""What an analysis is asked to do, in the words of `megafork analyze`'s options."""

from __future__ import annotations

from dataclasses import dataclass

from megafork.recipe import RecipeError
from megafork.recipe.kinds import MEGABYTES, SEEDS, check_option


@dataclass(frozen=True)
class AnalysisOptions:
    """An analysis. Raises RecipeError, naming the option, for what cannot be."""

    model: str
    """Whose responses are analysed: a Hugging Face folder, `owner/model`, a run (its last model), or a checkpoint."""
    prompts: str
    """Forms as `recipe.Data.train`."""
    out: str
    """Folder of responses, entropies and results."""
    against: tuple[str, ...] = ()
    """Models compared on the same responses, oldest first, as LABEL=MODEL or MODEL; the first is the base. Empty, of a run: the model
    it started from and each of its checkpoints."""
    samples: int = 1
    """Responses to each prompt."""
    limit: int | None = None
    """Only the first prompts."""
    template: str = "paper"
    """As in `megafork eval`."""
    columns: str = ""
    """As `data.columns` in a recipe, in YAML: {answer: gold}."""
    chat_template_args: str = ""
    """As `data.chat_template_args`, in YAML: {enable_thinking: false}."""
    add_bos: str = "auto"
    """As `data.add_bos`."""
    temperature: float = 1.0
    """Of sampling; entropies are taken at it as well."""
    max_tokens: int | None = None
    """Of a response. None: 20,480, or what the model's positions leave."""
    rho: float = 0.2
    """Share of the positions that count as forks in the overlap."""
    min_count: int = 100
    """Tokens seen less often have no place among those of highest and lowest mean entropy."""
    seed: int = 1
    tp: int = 1
    """Tensor parallel size, of the vLLM engines and of Megatron."""
    pp: int = 1
    """Pipeline parallel size of Megatron."""
    cp: int = 1
    """Context parallel size of Megatron."""
    ranks: int | None = None
    """Processes, which share the inputs. None: one a GPU, or tp x pp x cp without GPUs. Ignored under torchrun or Slurm."""
    dtype: str | None = None
    """fp32 or bf16. None: as config.json says."""
    kv_cache_mb: int | None = None
    """As `rollout.kv_cache_mb`."""

    def __post_init__(self) -> None:
        for name in ("samples", "limit", "max_tokens", "min_count", "tp", "pp", "cp", "ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"--{name.replace('_', '-')} is {value}: must be at least 1")
        check_option("seed", self.seed, SEEDS)
        check_option("kv-cache-mb", self.kv_cache_mb, MEGABYTES)
        if not 0 < self.rho <= 1:
            raise RecipeError(f"--rho is {self.rho}: must be above 0 and at most 1")
        if not 0.01 <= self.temperature <= 100:
            raise RecipeError(f"--temperature is {self.temperature}: must be between 0.01 and 100; greedy tokens have no entropy")
        if self.dtype not in (None, "fp32", "bf16"):
            raise RecipeError(f"--dtype is {self.dtype!r}: must be fp32 or bf16")
        if self.ranks is not None and self.ranks % self.model_size:
            raise RecipeError(f"--ranks is {self.ranks}, no multiple of --tp x --pp x --cp = {self.model_size}: choose one")

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp
