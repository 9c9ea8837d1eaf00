"""Makes a forked rank believe that it has a GPU: torch.cuda answers, tensors can be created on cuda:0, process groups claim to be NCCL."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace
from typing import Any

import torch
import varlen
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import _disable_current_modes

from megafork.parallel import blocks, vocab
from rehearsal.groups import BACKENDS
from rehearsal.ledger import Ledger
from rehearsal.tensors import DEVICE, DeviceTensor, OperatorMode, is_pinned, pin

_CREATORS = ("zeros", "ones", "empty", "full", "arange", "rand", "randn", "eye", "zeros_like", "ones_like", "empty_like", "full_like")


def rehearse() -> Ledger:
    """From here on this process has a GPU. For forked ranks only: it cannot be undone. `compat.cpu`'s substitutes for CUDA are removed,
    except that random states remain the CPU's."""
    ledger = DeviceTensor.ledger = Ledger()
    _take_back_the_shim()
    _answer_for_cuda(ledger)
    _make_tensors(ledger)
    BACKENDS.install()
    vocab._implementation = lambda device: blocks  # Triton's kernels need a GPU, or its interpreter
    varlen.install()  # FlashAttention
    CausalBias.__new__ = _outside_of_modes  # type: ignore[method-assign, assignment]
    OperatorMode(ledger).__enter__()
    return ledger


def _take_back_the_shim() -> None:
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, getattr(torch, name).__wrapped__)
    torch.Tensor.type = torch.Tensor.type.__wrapped__  # type: ignore[attr-defined, method-assign]


class _Stream:
    """A stream or an event. A host that waits for it is recorded."""

    ledger: Ledger
    cuda_stream = 0
    device = DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None:
        self.ledger.note("wait", "synchronize of a stream or event")

    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True


def _answer_for_cuda(ledger: Ledger) -> None:
    cuda: Any = torch.cuda
    _Stream.ledger = ledger
    stream = _Stream()
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = cuda.manual_seed = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: ledger.note("wait", "torch.cuda.synchronize")
    cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.get_device_properties = lambda *args: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, name="H100"
    )
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.Stream, cuda.Event = type("Stream", (_Stream,), {}), type("Event", (_Stream,), {})
    cuda.stream = cuda.device = lambda *args: contextlib.nullcontext()
    cuda.nccl.version = lambda: (2, 29, 7)
    torch._C._cuda_getDevice = lambda: 0


def _make_tensors(ledger: Ledger) -> None:
    library: Any = torch
    from_values, to = library.tensor, library.Tensor.to

    def tensor(data: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = from_values(_numbers(data), **kwargs)
        if device is not None and _named(device).type == "cuda":
            ledger.note("wait", "torch.tensor on the device, a copy of host values")
            return DeviceTensor(made)
        return pin(made) if pin_memory else made

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], DeviceTensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        return to(self, *map(_named_number, args), **{name: _named_number(value) for name, value in kwargs.items()})

    def pinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        if isinstance(self, DeviceTensor):
            raise ledger.refuse("pin_memory of a device tensor: only dense CPU tensors can be pinned")
        return self if is_pinned(self) else pin(self)

    for name in _CREATORS:
        setattr(library, name, _by_number(getattr(library, name)))
    library.tensor = tensor
    library.Tensor.to = moved
    library.Tensor.cuda = lambda self, device=None, non_blocking=False: self.to(DEVICE, non_blocking=non_blocking)
    library.Tensor.pin_memory = pinned
    library.Tensor.is_pinned = lambda self, device=None: is_pinned(self)


def _outside_of_modes(cls: type[torch.Tensor], *args: Any) -> torch.Tensor:
    """An empty tensor of a subclass, which torch cannot create from one that a mode has created."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls)


def _by_number(create: Any) -> Any:
    """Make a function accept a device number, as returned by torch.cuda.current_device: this torch has no GPUs to number."""

    @functools.wraps(create)
    def created(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _named(kwargs["device"])
        return create(*args, **kwargs)

    return created


def _named(device: Any) -> Any:
    return _named_number(device) if device is None else torch.device(_named_number(device))


def _named_number(value: Any) -> Any:
    return DEVICE if type(value) is int else value


def _numbers(data: Any) -> Any:
    """`data` with device tensors, also within lists, replaced by their values, each read on the host."""
    if isinstance(data, torch.Tensor):
        return data.item() if isinstance(data, DeviceTensor) else data
    return type(data)(_numbers(value) for value in data) if isinstance(data, list | tuple) else data
