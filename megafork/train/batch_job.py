"""A run within a batch job: it sends a heartbeat, sees a request to stop, and confirms that it stopped.

All communication is by files in a folder shared by the batch script and every rank: a signal would also reach the processes that a rank has
started (verifiers, engines), kill those that do not expect it, and be altered by launchers and containers.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from megafork.files import whole
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world

JOB_FOLDER = "MEGAFORK_JOB"
"""Environment variable with the folder's path, set by `slurm/common.sh`. Unset or "": the run is not part of a batch job."""


class BatchJob:
    """Created by every rank. Only rank 0 accesses the files, so that a slow file system can't make ranks disagree."""

    def __init__(self, mesh: Mesh, folder: Path | None = None) -> None:
        """`folder`: by default the one in the environment."""
        named = os.environ.get(JOB_FOLDER)
        self._mesh = mesh
        self._folder = (folder or (Path(named) if named else None)) if mesh.is_rank_zero else None

    def beat(self, step: int) -> None:
        """Report that the run is alive and has finished `step`. The batch script assumes that a run without news for long has hung."""
        self._write("heartbeat", f"step {step} at {time.time():.3f}")

    def wants_stop(self) -> bool:
        """Whether the batch script has asked the run to end, the same answer on every rank. Every rank of the world must call."""
        asked = self._folder is not None and (self._folder / "stop").exists()
        return over_world([float(asked)], self._mesh, "max")[0] > 0

    def stopped(self, step: int) -> None:
        """Report that the run ends on request with a complete checkpoint of `step`. The job is then queued again."""
        self._write("stopped", f"step {step}")

    def _write(self, name: str, text: str) -> None:
        """Write atomically: the batch script never reads half a file."""
        if self._folder is not None:
            with whole(self._folder / name) as unfinished:
                unfinished.write_text(text + "\n")
