"""The run: its name, length, checkpoints, evaluation and log."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megafork.recipe.kinds import Count, CountOrZero, Fraction, NonNegative, Section, Seed, Tokens, shown


class Run(Section):
    name: str = "run"
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Parent folder of run folders."""
    seed: Seed = 1
    """The only seed. Roll-outs, data order and `select: random` derive from it."""
    ranks: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes that `megafork train` starts on this machine. Unset: one per GPU, or the fewest for the layout without GPUs. Ignored under
    torchrun and Slurm, which start the ranks themselves."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name):
            raise ValueError(
                f"run.name is {shown(name)}: it names a folder, use up to 128 letters, digits, `_`, `-` and `.`, no `-` or `.` first"
            )
        return name


class Train(Section):
    steps: Count = 100
    """Steps of the run (sft: optimizer updates)."""
    minibatches: Count = 1
    """Optimizer updates per step; the step's prompts are divided evenly among them."""
    micro_batch_tokens: Tokens | None = None
    """Maximum tokens packed into a micro-batch. Unset: just enough for the longest possible sequence."""


class Checkpoint(Section):
    every: CountOrZero = 0
    """Save every N steps and after the last; 0 saves after the last step only."""
    keep_last: Count = 2
    """Number of checkpoints kept; older ones are deleted once a newer one is complete."""
    export_hf: bool = True
    """Write the trained model as a Hugging Face folder `hf/` after the last step."""
    background: bool = False
    """Write checkpoints while training continues, from a copy in host memory, in a process forked by each rank."""


class Eval(Section):
    every: CountOrZero = 0
    """Evaluate on data.eval every N steps, and always before the first and after the last step."""
    samples: Count = 1
    """Responses to each held-out prompt."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Fraction = 1.0
    """Nucleus sampling threshold of the evaluation."""


class Profile(Section):
    steps: Annotated[list[Count], Field(min_length=1)]
    """Steps to look into."""
    what: Literal["torch", "memory", "nsys"] = "torch"
    """`torch`: a trace of every operator. `memory`: CUDA's allocations. `nsys`: ranges for Nsight Systems."""


class Log(Section):
    tensorboard: bool = True
    """Write tensorboard/ in the run folder."""
    wandb: str | None = None
    """Also send metrics to this Weights & Biases project (extra `wandb`; WANDB_MODE=offline keeps them in the run folder). Unset: off."""
    text: bool = False
    """Write the terminal output to log.txt in the run folder, as plain text."""
    rollouts_every: CountOrZero = 1
    """Write rollouts/step_*.parquet every N steps; 0: never."""
    profile: Profile | None = None
    """Profile some steps, as `{steps: [3], what: torch}` (docs/troubleshooting.md, A look inside a step). Unset: none."""
