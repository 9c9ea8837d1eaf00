"""Jobs for ranks, in a module that is imported at once: one rank fails, and the others wait in no collective that could tell them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from megafork.ranks import DONE, record


def fail_behind_a_back(folder: Path, rank: int) -> int:
    if os.environ["RANK"] == str(rank):
        return 3
    (folder / os.environ["RANK"]).touch()
    while True:
        time.sleep(1)


def stopped_after_recording(code: int) -> int:
    """Rank 1 fails, and is stopped before it has ended."""
    if os.environ["RANK"] == "0":
        signal.pause()
    record("deliberate", code)
    os.kill(os.getpid(), signal.SIGTERM)
    return DONE
