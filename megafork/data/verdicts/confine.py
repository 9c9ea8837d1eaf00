"""Restricts a process before it runs model-written code: capabilities, system calls, and resource limits.

The restrictions are inherited by child processes and cannot be undone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass

from megafork.data.verdicts import seccomp

_SET_DUMPABLE, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS, _AMBIENT = 4, 24, 36, 38, 47
_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_NOBODY = 65534
_OPEN_FILES = 1024

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """Limits of one process. `memory_mb` counts only memory mapped after the process is confined."""

    memory_mb: int
    cpu_s: float | None
    """None: no limit."""
    file_mb: int


def hide() -> None:
    """Keep the user's other processes from reading this one's memory or descriptors, or attaching a debugger; inherited by a fork."""
    _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def show() -> None:
    """Undo `hide`: without it a process cannot open its own /dev/stdin."""
    _libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """Make orphaned descendants of this process its children."""
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Drop all of root's privileges for good: no program started later regains them."""
    for capability in range(64):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _libc.capset(ctypes.byref(header), ctypes.byref(none))


def confine_own_file(limits: Limits, rules: seccomp.Rules | None) -> None:
    """Restrict this process and its children for a user's own verifier. It stays hidden, also from them.

    Raises OSError if there are `rules` and the kernel has no system-call filters.
    """
    _limit(limits)
    drop_capabilities()
    if rules is not None:
        seccomp.install(rules)


def confine(limits: Limits, rules: seccomp.Rules, *, boxed: bool) -> None:
    """Restrict this process for model-written code, inside a sandbox (`boxed`) or outside.

    Raises OSError if the kernel has no system-call filters.
    """
    _limit(limits)
    if boxed:
        show()  # no other process is in the sandbox to look
    elif os.getuid() == 0 and _anybody_reads_python():
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    drop_capabilities()
    seccomp.install(rules)


def limit_memory(memory_mb: int) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_AS, mapped + (memory_mb << 20))
    _lower(resource.RLIMIT_CORE, 0)


def limit_cpu(cpu_s: float) -> None:
    _lower(resource.RLIMIT_CPU, int(cpu_s) + 1)


def _limit(limits: Limits) -> None:
    limit_memory(limits.memory_mb)
    if limits.cpu_s is not None:
        limit_cpu(limits.cpu_s)
    _lower(resource.RLIMIT_FSIZE, limits.file_mb << 20)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_MSGQUEUE, 0)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _anybody_reads_python() -> bool:
    """Whether this Python's files are readable by every user, so that imports still work after switching to another user."""
    for root in {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}:
        path = root
        while path != "/":
            if not os.stat(path).st_mode & 0o001:
                return False
            path = os.path.dirname(path)
    return True
