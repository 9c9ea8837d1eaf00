"""What a process gives up before it runs what a model wrote: capabilities, system calls, and more than its share of the machine.

All of it is inherited by what the process starts, and cannot be taken back.
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
    """Of one process. `memory_mb` is what it may map beyond what it has mapped when it is confined."""

    memory_mb: int
    cpu_s: float
    file_mb: int


def hide() -> None:
    """No other process of this user may read this one's memory or descriptors, or stop it with a debugger; inherited by a fork."""
    _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def show() -> None:
    """Undo `hide`: without it a process cannot open its own /dev/stdin."""
    _libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)


def adopt_orphans() -> None:
    """What descendants of this process leave behind becomes its child."""
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """What root may do beyond other users; no program that is started brings it back."""
    for capability in range(64):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    _libc.prctl(_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _libc.capset(ctypes.byref(header), ctypes.byref(none))


def confine(limits: Limits, rules: seccomp.Rules | None, *, boxed: bool, own_file: bool = False) -> None:
    """For code that a model wrote, inside a sandbox (`boxed`) or outside of one; `own_file`: for a verifier of the user's own.

    Raises OSError if there are `rules` and the kernel has no system-call filters.
    """
    _limit(limits)
    if boxed:
        show()  # nobody else is there to see it
    elif os.getuid() == 0 and not own_file and _anybody_reads_python():
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    drop_capabilities()
    if rules is not None:
        seccomp.install(rules)


def limit_memory(memory_mb: int) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _lower(resource.RLIMIT_AS, mapped + (memory_mb << 20))
    _lower(resource.RLIMIT_CORE, 0)


def _limit(limits: Limits) -> None:
    limit_memory(limits.memory_mb)
    _lower(resource.RLIMIT_CPU, int(limits.cpu_s) + 1)
    _lower(resource.RLIMIT_FSIZE, limits.file_mb << 20)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_MSGQUEUE, 0)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _anybody_reads_python() -> bool:
    """Whether a program that changes to another user can still import what it names."""
    for root in {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}:
        path = root
        while path != "/":
            if not os.stat(path).st_mode & 0o001:
                return False
            path = os.path.dirname(path)
    return True
