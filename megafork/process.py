"""Process control that the standard library lacks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent(parent: int) -> None:
    """Kill this process when its parent, with the id `parent`, ends, even by SIGKILL. Linux only; elsewhere it has no effect."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
