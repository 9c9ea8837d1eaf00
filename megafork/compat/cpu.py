"""megatron-core without CUDA.

Every part of megatron-core (0.16.1 to 0.19) that megafork uses runs on the CPU over gloo, except that allocation, seeding and
synchronisation hard-code CUDA. `install()` redirects just those calls. With CUDA it does nothing.

Only calls that would raise without CUDA are touched. This file can go when megatron-core takes its device from one place.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CREATORS = ("tensor", "zeros", "ones", "empty", "empty_like")
_NOISY_LOGGERS = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.rerun_state_machine",
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer",
)
_IMPORTED_EAGERLY = (
    "megatron.core",
    "megatron.core.tensor_parallel.random",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
)
_installed = False


def install() -> None:
    """Import megatron-core in a way that works on this machine. Call before anything imports `megatron`. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    if torch.cuda.is_available():
        return
    if "megatron.core" in sys.modules:
        raise ImportError("megatron.core was imported before megafork.compat.cpu.install(): import megafork first")
    _redirect_creation()
    _redirect_cuda_calls()
    _redirect_tensor_type()
    with _eager_import():
        for module in _IMPORTED_EAGERLY:
            importlib.import_module(module)
    _replace_rng_tracker()
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _redirect_creation() -> None:
    """Make calls such as `torch.empty(..., device="cuda", pin_memory=True)` allocate on the CPU."""
    _device_constructors()  # torch caches these functions by identity for `with torch.device(...)`: fill the cache with the originals
    for name in _CREATORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _on_cpu(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def created(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or torch.device(device).type == "cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return create(*args, **kwargs)

    return created


class Stream:
    """Stand-in for a CUDA stream or event: CPU operations already run in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Stream()

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _redirect_cuda_calls() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    for name in ("synchronize", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, _no_operation(name))
    stream = Stream()
    cuda.current_stream = lambda device=None: stream  # type: ignore[assignment, return-value]
    cuda.default_stream = lambda device=None: stream  # type: ignore[assignment, return-value]
    cuda.Stream = type("Stream", (Stream,), {})  # type: ignore[assignment, misc]
    cuda.Event = type("Event", (Stream,), {})  # type: ignore[assignment, misc]


def _no_operation(name: str) -> Callable[..., None]:
    """A separate function object for each name: dynamo refuses one that several names share."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    nothing.__name__ = name
    return nothing


def _redirect_tensor_type() -> None:
    """The optimizer groups parameters by `tensor.type()` strings and knows only `torch.cuda.*`."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def _eager_import() -> Iterator[None]:
    """Skip `torch.compile` decorators: megatron then imports in 2.4 s instead of 6 s, and on the CPU they gain nothing."""
    original = torch.compile

    def eager(model: Any = None, **kwargs: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = eager
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = original


class CpuRngTracker:
    """megatron's tracker of named random states (dropout, recompute), on the CPU's generator."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return bool(self.states_)

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)


def _replace_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
