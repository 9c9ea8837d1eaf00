"""A run inside of a batch job: it says that it lives, hears that it shall stop, and says that it did.

All by files in one folder that the batch script and every rank see: a signal would also reach the processes that a rank has started
(verifiers, engines), end those that do not expect it, and change its meaning on the way through launchers and containers.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from megafork.files import whole
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world

JOB_FOLDER = "MEGAFORK_JOB"
"""Environment variable that names the folder; `slurm/common.sh` sets it. Empty or absent: the run is not part of a batch job."""


class BatchJob:
    """Every rank makes one. Only rank 0 reads and writes the files, so that a slow file system can't divide the ranks."""

    def __init__(self, mesh: Mesh, folder: Path | None = None) -> None:
        """`folder`: that of the environment by default."""
        named = os.environ.get(JOB_FOLDER)
        self._mesh = mesh
        self._folder = (folder or (Path(named) if named else None)) if mesh.is_rank_zero else None

    def beat(self, step: int) -> None:
        """Say that the run is alive and has done `step`. The batch script takes a run for hanging that says nothing new for long."""
        self._write("heartbeat", f"step {step} at {time.time():.3f}")

    def wants_stop(self) -> bool:
        """Whether the batch script has asked the run to end, the same answer on every rank. Every rank of the world must call."""
        asked = self._folder is not None and (self._folder / "stop").exists()
        return over_world([float(asked)], self._mesh, "max")[0] > 0

    def stopped(self, step: int) -> None:
        """Say that the run ends because it was asked to, and that its checkpoint of `step` is complete. The job is queued again."""
        self._write("stopped", f"step {step}")

    def _write(self, name: str, text: str) -> None:
        """The batch script never reads half a file."""
        if self._folder is not None:
            with whole(self._folder / name) as unfinished:
                unfinished.write_text(text + "\n")
