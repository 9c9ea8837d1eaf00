"""Builds the file system of a sandbox whose namespaces `unshare` made; bubblewrap builds its own. `sandbox.py` describes the contents.

`python -m megafork.data.verdicts.mounts VIEW` tries it: exit code 0 if it works.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from collections.abc import Sequence

from megafork.data.verdicts import confine, sandbox

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # on every architecture, since Linux 5.12
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_INODES = 20_000
_BASE = "/tmp"  # a folder present on every system, in which the new root is built

_libc = ctypes.CDLL(None, use_errno=True)


class _Attributes(ctypes.Structure):
    """The kernel's `struct mount_attr`."""

    _fields_ = (("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64), ("userns", ctypes.c_uint64))


def enter(view: str) -> None:
    """Enter the file system of `view` (JSON of a `sandbox.View`; "" if bubblewrap has built it) and drop every capability.

    Call as process 1 of new user, mount and PID namespaces. Raises OSError if the kernel does not allow it.
    """
    if view:
        seen = json.loads(view)
        _build(seen["read_only"])
        os.chdir(seen["folder"])
    confine.drop_capabilities()


def _build(paths: Sequence[str]) -> None:
    sources = {path: "/old" + os.path.realpath(path) for path in paths}
    _mount("none", "/", None, _REC | _PRIVATE)
    _tmpfs(_BASE, size="1m")
    os.mkdir(f"{_BASE}/old")
    os.mkdir(f"{_BASE}/new")
    _pivot(_BASE, f"{_BASE}/old")
    _tmpfs("/new", size="1m")
    first, hidden = sandbox.split(paths)
    for path in first:
        _read_only_bind(sources[path], path)
    _devices()
    _make(False, "/proc")
    _mount("proc", "/new/proc", "proc", _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    for folder in (*sandbox.SCRATCH, "/run"):
        _make(False, folder)
        _tmpfs(f"/new{folder}", size=f"{sandbox.SCRATCH_MB}m", options=f"mode=1777,nr_inodes={_INODES}")
    for path in hidden:
        _read_only_bind(sources[path], path)
    for folder in ("/run", "/dev", "/"):
        _set_read_only(f"/new{folder}", recursive=False)
    _libc.umount2(b"/old", _DETACH)
    os.chdir("/new")
    _pivot(".", ".")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def _devices() -> None:
    _make(False, "/dev")
    _tmpfs("/new/dev", size="64k")
    for name in sandbox.DEVICES:
        _make(True, f"/dev/{name}")
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, _BIND)
    for name, target in {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}.items():
        os.symlink(f"/proc/self/{target}", f"/new/dev/{name}")


def _read_only_bind(source: str, path: str) -> None:
    _make(not os.path.isdir(source), path)
    _mount(source, f"/new{path}", None, _BIND | _REC)
    _set_read_only(f"/new{path}", recursive=True)


def _make(file: bool, path: str) -> None:
    """Create a mount point unless the path exists."""
    place = f"/new{path}"
    if os.path.exists(place):
        return
    os.makedirs(os.path.dirname(place) if file else place, exist_ok=True)
    if file:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY))


def _set_read_only(place: str, *, recursive: bool) -> None:
    attributes = _Attributes(_RDONLY | _NOSUID | (_NODEV if recursive else 0), 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.sizeof(attributes)
    _check(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(place), flags, ctypes.byref(attributes), size), place)


def _tmpfs(place: str, *, size: str, options: str = "mode=755") -> None:
    _mount("tmpfs", place, "tmpfs", _NOSUID | _NODEV, f"size={size},{options}")


def _mount(source: str, place: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [os.fsencode(text) if text is not None else None for text in (source, place, kind, options)]
    _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), place)


def _pivot(new: str, old: str) -> None:
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"no sandbox for {platform.machine()} without bubblewrap")
    _check(_libc.syscall(number, os.fsencode(new), os.fsencode(old)), new)
    os.chdir("/")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    enter(sys.argv[1])
