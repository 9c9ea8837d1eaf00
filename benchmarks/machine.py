"""The machine and versions of a result: enough to repeat it, nothing that identifies the machine's owner."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import psutil
import torch

from benchmarks import peers


def describe() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu,
        "load_at_start": [round(load, 1) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    here = {name: version(name) for name in ("megafork", "torch", "megatron-core")}
    return {"python": platform.python_version(), **here, **peers.versions()}


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
