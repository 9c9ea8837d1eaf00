"""A system-call filter for model-written code, by the kernel's seccomp (man 2 seccomp). For x86-64 and AArch64."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from dataclasses import dataclass

_SET_SECCOMP, _NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld abs word; jeq, jge, jset with a constant; ret
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; an argument has 8 bytes, the low word first
_X32 = 0x40000000
_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020080  # the latter: every kind of namespace
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SIDE = {"x86_64": 0, "aarch64": 1}

# name: (number on x86-64, number on AArch64); None if there is no such call
_NEVER = {  # other processes' memory, kernel interfaces that programs do not need, memory not covered by limits, namespaces, sockets
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "personality": (135, 92), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
}  # fmt: skip
_PROCESSES = {"fork": (57, None), "vfork": (58, None), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
_SIGNALS = {"kill": (62, 129), "tgkill": (234, 131)}  # allowed for the process itself: abort() uses them
_CHANGES = {
    "creat": (85, None), "truncate": (76, 45), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "unlink": (87, None), "unlinkat": (263, 35), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_OPEN, _OPENAT, _OPENAT2 = (2, None), (257, 56), (437, 437)

Numbers = tuple[int, int | None]
Instruction = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, constant."""


@dataclass(frozen=True)
class Rules:
    """Optional permissions: to start processes and send signals to others; to change files (outside a sandbox, all of the user's)."""

    processes: bool
    writing: bool


def supported() -> bool:
    return platform.system() == "Linux" and platform.machine() in _SIDE


def install(rules: Rules) -> None:
    """Install the filter for this process and all it starts, permanently. Raises OSError if the kernel has no such filters."""
    if not supported():
        raise OSError(f"no system-call filter for {platform.machine()}")
    program = _program(rules, platform.machine(), os.getpid())
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_SET_SECCOMP, _MODE_FILTER, head, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel has no system-call filters (seccomp)")


def _program(rules: Rules, machine: str, pid: int) -> list[Instruction]:
    side = _SIDE[machine]
    never = [*_NEVER.values(), *([] if rules.processes else _PROCESSES.values()), *([] if rules.writing else _CHANGES.values())]
    program = [
        *((_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]), (_RETURN, 0, 0, _KILL)),
        *((_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)),
    ]
    for numbers in never:
        program += _refuse(numbers[side])
    program += _refuse(_CLONE3[side], errno.ENOSYS)  # its flags are in memory, out of reach of a filter; the C library falls back to clone
    program += _refuse_unless(_SOCKET[side], 0, (_EQUAL, 1, 0, socket.AF_UNIX))
    if rules.processes:
        program += _refuse_unless(_CLONE[side], 0, (_ANY_BIT, 0, 1, _CLONE_NEW))
    else:
        program += _refuse_unless(_CLONE[side], 0, (_ANY_BIT, 1, 0, _CLONE_THREAD))
        for signals in _SIGNALS.values():
            program += _refuse_unless(signals[side], 0, (_EQUAL, 1, 0, pid))
    if not rules.writing:
        program += _refuse_unless(_OPEN[side], 1, (_ANY_BIT, 0, 1, _FOR_WRITING))
        program += _refuse_unless(_OPENAT[side], 2, (_ANY_BIT, 0, 1, _FOR_WRITING))
        program += _refuse(_OPENAT2[side], errno.ENOSYS)
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _refuse(number: int | None, error: int = errno.EPERM) -> list[Instruction]:
    return [] if number is None else [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]


def _refuse_unless(number: int | None, argument: int, test: Instruction) -> list[Instruction]:
    """Refuse a call unless `test`, on the low word of an argument, jumps over the refusal; then load the call's number again."""
    if number is None:
        return []
    load = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
    return [(_EQUAL, 0, 4, number), load, test, (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_LOAD, 0, 0, _NUMBER)]
