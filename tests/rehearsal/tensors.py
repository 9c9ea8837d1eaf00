"""Tensors that claim to be on cuda:0 but hold CPU memory, and the operators on them."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rehearsal import groups
from rehearsal.ledger import Ledger
from rehearsal.rules import COPIES, aten, mixed, tensors, waits

DEVICE = torch.device("cuda", 0)
_HOST = torch.device("cpu")
_ENGINE = ("_engine_run_backward", "custom_backward")
"""Functions of torch and Megatron in which only autograd's engine creates tensors."""
_TYPES = {
    torch.float32: "FloatTensor",
    torch.float64: "DoubleTensor",
    torch.bfloat16: "BFloat16Tensor",
    torch.float16: "HalfTensor",
    torch.int64: "LongTensor",
    torch.int32: "IntTensor",
    torch.uint8: "ByteTensor",
    torch.bool: "BoolTensor",
}


class DeviceTensor(Tensor):
    """To C++ a CPU tensor without memory; to Python a tensor on cuda:0. `host` has its values."""

    ledger: ClassVar[Ledger]
    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=_HOST
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(cls.ledger, func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return 0

    def type(self, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        return f"torch.cuda.{_TYPES[self.dtype]}" if dtype is None else self.to(dtype, non_blocking=non_blocking)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = bool(kwargs.pop("copy", False))
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            moved = _ToHost.apply(self, bool(non_blocking))
            return moved if dtype is None else moved.to(dtype)
        return super().to(dtype or self.dtype, copy=copy)

    def cpu(self, memory_format: Any = None) -> Any:
        return self.to(_HOST)

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def tolist(self) -> Any:
        self.ledger.note("wait", "tolist")
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise self.ledger.refuse("can't convert cuda:0 device type tensor to numpy", TypeError)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    @property
    def data(self) -> DeviceTensor:
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, new: Tensor) -> None:
        """Assigning a host tensor, as when training state is parked, makes this a host tensor, in its reported device and its memory."""
        _set_data(self, new)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def record_stream(self, stream: Any) -> None: ...

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        return DeviceTensor(self.host.clone()).requires_grad_(self.requires_grad)  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.ledger.note("wait", "pickled")
        return DeviceTensor, (self.host,)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"


def _set_data(tensor: DeviceTensor, new: Tensor) -> None:
    torch._C.TensorBase.data.__set__(tensor, new if isinstance(new, DeviceTensor) else DeviceTensor(new))  # type: ignore[attr-defined]
    tensor.host = new.host if isinstance(new, DeviceTensor) else new
    tensor.__class__ = DeviceTensor if isinstance(new, DeviceTensor) else ParkedTensor


class ParkedTensor(DeviceTensor):
    """A device tensor whose data was set to a host tensor's: it stays on the host until its data is set again."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.to(*args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.cuda(*args, **kwargs)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _HOST

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return True


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DeviceTensor, non_blocking: bool) -> Tensor:
        if not isinstance(tensor, ParkedTensor):  # torch pins the memory that it allocates for an asynchronous copy to the host
            tensor.ledger.note(*(("copy", "to the host") if non_blocking else ("wait", "a copy to the host")))
        return tensor.host.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return DeviceTensor(gradient), None


class OperatorMode(TorchDispatchMode):
    """Intercepts operators without device tensors among their arguments: those that create device tensors, or copy to the device."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(self.ledger, func, args, kwargs or {})


def run(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator with the CPU's kernel but CUDA's rules; its results are device tensors if CUDA's would be."""
    every = list(tensors((*args, *kwargs.values())))
    device = [tensor for tensor in every if _on_device(tensor)]
    host = [tensor for tensor in every if not _on_device(tensor) and tensor.layout == torch.strided]
    if func.namespace == "c10d":
        groups.check(ledger, func, args, device, host)
        return _collective(func, args, kwargs)
    if mixed(func, args, device, host):
        raise ledger.refuse(f"{func} of tensors on the device and on the host {[tuple(tensor.shape) for tensor in host]}")
    if device and (why := waits(func, args, kwargs)):
        ledger.note("wait", why)
    wanted = kwargs.get("device")
    on_device = torch.device(wanted).type == "cuda" if wanted is not None else bool(device)
    if not on_device and not host and _caller() in _ENGINE:
        on_device = True
    if func in COPIES:
        on_device = _copy(ledger, func, args, kwargs, on_device)
    result = _compute(func, args, kwargs, pinned=bool(kwargs.get("pin_memory")) and not on_device)
    if written := [value for value in _written(func, args, kwargs) if isinstance(value, Tensor)]:
        return written[0] if len(written) == 1 else tuple(written)
    return _wrap(result) if on_device else result


def _on_device(tensor: Tensor) -> bool:
    return type(tensor) is DeviceTensor


def _copy(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], on_device: bool) -> bool:
    """Record a copy between host and device. Returns whether the result is on the device."""
    if func is aten.copy_.default:
        target, source = args[0], args[1]
        non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        on_device = _on_device(target)
        pinned = is_pinned(source if on_device else target)
    else:
        source, non_blocking = args[0], bool(kwargs.get("non_blocking"))
        on_device = on_device or _on_device(source)  # C++ reports the CPU for a device tensor, but means the tensor's own device
        pinned = is_pinned(source)
    if _on_device(source) != on_device:
        direction = "to the device" if on_device else "to the host"
        if not non_blocking:
            ledger.note("wait", f"a copy {direction}")
        else:
            ledger.note("copy" if pinned else "pageable", direction)
    return on_device


def _compute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, pinned: bool) -> Any:
    a, k = _plain(args), {name: _plain(value) for name, value in kwargs.items() if name != "pin_memory"}
    if k.get("device") is not None:
        k["device"] = _HOST
    if func is aten.mm.dtype:  # only CUDA has bf16 products with fp32 results
        return a[0].float() @ a[1].float()
    if func is aten.addmm.dtype_out:
        return k["out"].copy_(a[0].addmm(a[1].float(), a[2].float()))
    result = func(*a, **k)
    return pin(result) if pinned else result


def _plain(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.host
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return DeviceTensor(value) if not isinstance(value, DeviceTensor) and value.layout == torch.strided else value
    if isinstance(value, list | tuple):
        return type(value)(_wrap(item) for item in value)
    return value


@functools.cache
def _write_slots(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that the operator writes and returns."""
    schema = func._schema
    if not any(result.alias_info and result.alias_info.is_write for result in schema.returns):
        return ()
    return tuple((n, a.name) for n, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for position, name in _write_slots(func):
        yield kwargs[name] if name in kwargs else args[position]


def _collective(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a collective with gloo on the tensors' memory. Returns the caller's own tensors together with the handle to wait for."""
    result = func(*_plain(args), **{name: _plain(value) for name, value in kwargs.items()})
    if isinstance(result, tuple | list) and len(result) == 2:
        return args[0], result[1]
    return result


def _caller() -> str:
    """Name of the innermost Python function that called the operator."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("rehearsal.", "torch._compile", "torch._dynamo")):
        frame = frame.f_back
    return frame.f_code.co_name


_PINNED: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
"""Memory reported as pinned, by address, for as long as a tensor uses it."""


def pin(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory."""
    memory = np.empty(max(tensor.numel() * tensor.element_size(), 1), dtype=np.uint8)
    _PINNED[memory.ctypes.data] = memory
    flat = torch.from_numpy(memory)[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor)


def is_pinned(tensor: Tensor) -> bool:
    return not _on_device(tensor) and _plain(tensor).untyped_storage().data_ptr() in _PINNED
