"""A run within a batch job: it sends a heartbeat, sees a request to stop, and confirms that it stopped.

All communication is by files in a folder shared by the batch script and every rank: a signal would also reach the processes that a rank has
started (verifiers, engines), kill those that do not expect it, and be altered by launchers and containers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megafork.files import whole
from megafork.parallel.mesh import Mesh
from megafork.parallel.reduce import over_world

JOB_FOLDER = "MEGAFORK_JOB"
"""Environment variable with the folder's path, set by `slurm/common.sh`. If unset or "", the run is not part of a batch job."""
BEAT_EVERY_S = 30.0
"""Seconds between two signs of life in a roll-out."""


class BatchJob:
    """Created by every rank. Only rank 0 accesses the files, so that a slow file system can't make ranks disagree.

    `heartbeat` states what the run is doing; the batch script assumes that a run without news for long has hung. `step` names the
    last step completed since this start, `stopped` the one after which the run ended on request.
    """

    def __init__(self, mesh: Mesh, folder: Path | None = None) -> None:
        """`folder`: by default the one in the environment."""
        named = os.environ.get(JOB_FOLDER)
        self._mesh = mesh
        self._folder = (folder or (Path(named) if named else None)) if mesh.is_rank_zero else None
        self._lock = threading.Lock()  # a roll-out may be running in a thread during training
        self._doing = ""
        self._progress = ""
        self._next = 0.0

    def beat(self, step: int, doing: str) -> None:
        """Report that the run is alive, and which part of `step` begins: a phase or a checkpoint."""
        with self._lock:
            self._doing = f"step {step}, {doing}"
            self._say_alive(self._doing)

    def progress(self, state: Callable[[], str]) -> None:
        """Report how far a roll-out is, at most every `BEAT_EVERY_S`, and only if `state` has changed: an engine that draws nothing stays
        silent. May be called at each of an engine's steps: `state` is called only when a report is due."""
        with self._lock:
            if self._folder is None or time.monotonic() < self._next:
                return
            self._next = time.monotonic() + BEAT_EVERY_S
            if (found := state()) != self._progress:
                self._progress = found
                self._say_alive(f"{self._doing}, {found}")

    def ended(self, step: int) -> None:
        """Report that `step` is done: a run that fails later is worth another start."""
        self._write("step", str(step))

    def wants_stop(self) -> bool:
        """Whether the batch script has asked the run to end, the same answer on every rank. Every rank of the world must call."""
        asked = self._folder is not None and (self._folder / "stop").exists()
        return over_world([float(asked)], self._mesh, "max")[0] > 0

    def stopped(self, step: int) -> None:
        """Report that the run ends on request with a complete checkpoint of `step`. The job is then requeued."""
        self._write("stopped", f"step {step}")

    def _say_alive(self, doing: str) -> None:
        self._write("heartbeat", f"{doing} at {time.time():.3f}")

    def _write(self, name: str, text: str) -> None:
        """Write atomically: the batch script never reads half a file."""
        if self._folder is not None:
            with whole(self._folder / name) as unfinished:
                unfinished.write_text(text + "\n")
