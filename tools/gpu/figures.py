"""The metrics of runs as one line of JSON: `python tools/gpu/figures.py RUN...`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from megafork.run_folder import read_steps

MEANS = ("time/", "throughput/", "memory/", "refit/", "rollout_mismatch/", "loss/capped_fraction")
"""Averaged over all steps but the first, which includes start-up."""
ENDS = ("loss", "loss/policy", "accuracy/mean", "eval/accuracy", "entropy/mean", "grad_norm")


def figures(run: Path) -> dict[str, Any]:
    steps = read_steps(run)
    names = sorted({name for step in steps for name in step})
    values = {name: [(n, step[name]) for n, step in enumerate(steps) if step.get(name) is not None] for name in names}
    means = {name: statistics.mean([v for n, v in values[name] if n] or [0.0]) for name in names if name.startswith(MEANS)}
    ends = {name: [value for _, value in values[name]] for name in ENDS if name in names}
    curve = {"loss": [round(value, 4) for value in ends["loss"]]} if "loss" in ends else {}
    return {"steps": len(steps), **means, **{f"{name} first, last": [v[0], v[-1]] for name, v in ends.items() if v}, **curve}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({Path(run).name: figures(Path(run)) for run in sys.argv[1:]}) + "\n")
