"""A planned step against a batch job's deadlines: when the job must be asked to stop, and how long it is silent (docs/cluster.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megafork.plan.speed import Step

WARNING_S = 2700
"""Seconds before its end at which Slurm warns a job: `--signal` of the scripts in slurm/."""
HANG_S = 5400
"""Default of `MEGAFORK_HANG_S`: seconds without a sign of life after which slurm/common.sh considers a run to be hanging."""
MARGIN = 1.5
"""Factor applied to estimates. NeMo-RL's published step took 1.35 times as long as planned (`tests/test_plan.py`)."""
SAVING_S = 600
"""Seconds for the checkpoint after the step, and for Slurm to notice that the job has ended."""


@dataclass(frozen=True)
class Deadlines:
    """Time that a job needs, in seconds."""

    warning: int
    """How long before its end the job is asked to stop: enough for a step that has just begun and its checkpoint, at least `WARNING_S`."""
    quiet_phase: str
    """The longest phase that gives a sign of life only at its start. A roll-out gives one every 30 s."""
    quiet: float
    """Planned duration of that phase."""

    @classmethod
    def of(cls, step: Step) -> Deadlines:
        needed = MARGIN * step.seconds + SAVING_S
        quiet, phase = max((step.score, "score"), (step.update, "update"), (step.refit, "refit"))
        return cls(max(WARNING_S, 60 * math.ceil(needed / 60)), phase, quiet)

    @property
    def hang(self) -> int:
        """The smallest sufficient `MEGAFORK_HANG_S`."""
        return 60 * math.ceil(MARGIN * self.quiet / 60)

    def missed(self, hang_s: float, time_left_s: float | None) -> Iterator[str]:
        """Reasons why a job would inevitably be considered hanging, or end in the middle of its first step; one line each.

        `time_left_s`: until Slurm ends the job; None if it has no time limit.
        """
        if hang_s < self.hang:
            yield (
                f"MEGAFORK_HANG_S is {hang_s:g}, but the {self.quiet_phase} is planned to take about {self.quiet:,.0f} s without a sign of "
                f"life: set MEGAFORK_HANG_S={self.hang} or more, or take more --nodes"
            )
        if time_left_s is not None and time_left_s < self.warning:
            yield (
                f"--time leaves the job {time_left_s:,.0f} s, but a step and its checkpoint may take {self.warning:,} s: "
                f"give --time={math.ceil(self.warning / 60)} (minutes) or more, or take more --nodes"
            )
