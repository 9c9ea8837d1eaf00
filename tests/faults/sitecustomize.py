"""Python imports this at its start when the folder is on its path: rank 1 fails, as FAULT says, once the file FAULT_WHEN is there."""

import atexit
import os
import signal
from types import FrameType


def _fail(signum: int, frame: FrameType | None) -> None:
    if not os.path.exists(os.environ["FAULT_WHEN"]):
        return
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    if os.environ["FAULT"] == "exit":
        os._exit(3)
    if os.environ["FAULT"] == "input":
        from megafork.recipe import RecipeError

        raise RecipeError("forks.select is deliberate: choose another")
    raise ArithmeticError("deliberate")


if "TORCHELASTIC_ERROR_FILE" in os.environ and os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "1":
    signal.signal(signal.SIGALRM, _fail)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.0)  # Python drops its handlers at its end
