"""A job for ranks, in a module that is imported at once: one rank fails, and the others wait in no collective that could tell them."""

from __future__ import annotations

import os
import time
from pathlib import Path


def fail_behind_a_back(folder: Path, rank: int) -> int:
    if os.environ["RANK"] == str(rank):
        return 3
    (folder / os.environ["RANK"]).touch()
    while True:
        time.sleep(1)
