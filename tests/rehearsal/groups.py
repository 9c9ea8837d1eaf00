"""Process groups that claim to be NCCL but are gloo, and the check for host tensors, which NCCL refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rehearsal.ledger import Ledger

WORLD = "cpu:gloo,cuda:nccl"
"""Backend of the default group, as `parallel.meeting` creates it."""


class Backends:
    """The backend requested for each group, by group name."""

    def __init__(self) -> None:
        self._asked: dict[str, str] = {}

    def of(self, group: dist.ProcessGroup) -> str:
        return self._asked.get(group.group_name, WORLD)

    def install(self) -> None:
        library: Any = dist
        new_group = library.new_group

        def made(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            kwargs.pop("pg_options", None)  # NCCL's
            group = new_group(*args, backend="gloo", **kwargs)
            if isinstance(group, dist.ProcessGroup):
                self._asked[group.group_name] = backend or WORLD
            return group

        library.new_group = library.distributed_c10d.new_group = made
        library.get_backend = lambda group=None: self.of(group or library.group.WORLD)


BACKENDS = Backends()


def check(ledger: Ledger, func: Any, args: Sequence[Any], device: Sequence[Tensor], host: Sequence[Tensor]) -> None:
    """Refuse a collective whose group has no backend for its tensors."""
    group = next((dist.ProcessGroup.unbox(value) for value in args if isinstance(value, torch.ScriptObject) and _is_group(value)), None)
    if group is None:
        return
    backend = BACKENDS.of(group)
    if device and host:
        raise ledger.refuse(f"{func} of tensors on the device and on the host")
    if host and "gloo" not in backend:
        raise ledger.refuse(f"{func} of a host tensor in a group of backend {backend!r}: no backend type associated with device type cpu")
    if device and "nccl" not in backend:
        ledger.note("wait", f"{func} of a device tensor by gloo, through the host")


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().qualified_name().endswith("c10d.ProcessGroup")
