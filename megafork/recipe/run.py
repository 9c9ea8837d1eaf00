"""The run around the steps: its name, length, checkpoints, evaluation and log."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megafork.recipe.kinds import Count, CountOrZero, Fraction, NonNegative, Section, Seed, Tokens, shown


class Run(Section):
    name: str = "run"
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Where run folders lie."""
    seed: Seed = 1
    """The one seed. Roll-outs, data order and `select: random` derive from it."""
    ranks: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that `megafork train` starts on this machine. Empty: one a GPU, or tp x pp x cp without GPUs. Ignored under torchrun
    or Slurm, which have started the ranks already."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
            raise ValueError(
                f"run.name is {shown(name)}: it names a folder, use up to 128 letters, digits, `_`, `-` and `.`, none of `-` and `.` first"
            )
        return name


class Train(Section):
    steps: Count = 100
    """Steps of the run (sft: optimizer updates)."""
    minibatches: Count = 1
    """Optimizer updates a step; the step's prompts are divided evenly among them."""
    micro_batch_tokens: Tokens | None = None
    """Tokens packed into a micro-batch at most. Empty: just enough for the longest possible sequence."""


class Checkpoint(Section):
    every: CountOrZero = 0
    """Save every N steps and after the last; 0 saves after the last step only."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    export_hf: bool = True
    """Write the trained model as a Hugging Face folder `hf/` after the last step."""
    background: bool = False
    """Write checkpoints while training goes on, from a copy in host memory; a rank forks a process for it."""


class Eval(Section):
    every: CountOrZero = 0
    """Evaluate on data.eval every N steps; before the first and after the last step always."""
    samples: Count = 1
    """Responses to each held-out prompt."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Fraction = 1.0
    """Nucleus of the evaluation's sampling."""


class Profile(Section):
    steps: Annotated[list[Count], Field(min_length=1)]
    """Steps to look into."""
    what: Literal["torch", "memory", "nsys"] = "torch"
    """`torch`: a trace of every operator. `memory`: CUDA's allocations. `nsys`: ranges for Nsight Systems."""


class Log(Section):
    tensorboard: bool = True
    """Write tensorboard/ in the run folder."""
    wandb: str | None = None
    """Project on Weights & Biases for the metrics as well (extra `wandb`; WANDB_MODE=offline keeps them in the run folder). Empty: none."""
    text: bool = False
    """Write log.txt in the run folder: the lines of the terminal, as plain text."""
    rollouts_every: CountOrZero = 1
    """Write rollouts/step_*.parquet every N steps; 0 never."""
    profile: Profile | None = None
    """Look inside some steps, as `{steps: [3], what: torch}` (docs/troubleshooting.md, A look inside a step). Empty: none."""
