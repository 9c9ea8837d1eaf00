"""Runs a model-written program in a separate process and returns its output or return value.

Each process is forked from a nursery: a process with a warm interpreter that has never seen a row. So a program cannot find expected
outputs or other responses in its memory, and its only descriptors are its input and output. Programs and results are passed in in-memory
files, so that neither side blocks the other.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megafork.data.verdicts import confine, plain, seccomp
from megafork.data.verdicts.processes import leaving, silence
from megafork.process import die_with_parent

OUTPUT_MB = 16
_RECURSION = 50_000
_PROCESSORS = os.cpu_count() or 1
_PROCESSOR_CLOCK = 2  # with a process id: the kernel's CPUCLOCK_SCHED, CPU time of all its threads (man 3 clock_getcpuclockid)
_SHORTEST_WAIT_S = 0.01
_LIMIT, _ENDED = struct.Struct("d"), struct.Struct("i?")
_FILES = ("program", "stdin", "stdout", "value")
PRELUDE = """
import sys, os, re, math, random, string, time, copy, json, io, collections, itertools, functools, heapq, bisect, operator, statistics
import fractions, decimal, datetime, typing, dataclasses, enum
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
from builtins import *
"""
"""Names that a program may use without importing them, as public data sets assume; `pow` stays Python's own."""


@dataclass(frozen=True)
class Program:
    """`setup` and then `source`. The result is its stdout, run as `__main__`; or, imported and evaluated with the names it has defined:
    the value of `expression`; the return value of `function` (of a class `Solution`, if defined) for `arguments`; or `token`, once `script`
    has run."""

    source: str
    setup: str = ""
    stdin: str = ""
    expression: str | None = None
    function: str | None = None
    arguments: Sequence[Any] = ()
    script: str | None = None
    token: str = ""

    @property
    def question(self) -> dict[str, Any] | None:
        """The part of the task that the process receives only after the program has run."""
        if self.expression is not None:
            return {"expression": self.expression}
        if self.function is not None:
            return {"function": self.function, "arguments": self.arguments}
        return {"script": self.script, "token": self.token} if self.script is not None else None


@dataclass(frozen=True)
class Outcome:
    """`ended`: it finished in time and without an exception. `value`: the requested value in a 1-tuple; None if none or not plain data."""

    ended: bool
    output: bytes
    value: tuple[Any] | None


@dataclass(frozen=True)
class Limits:
    test_timeout_s: float
    memory_mb: int
    boxed: bool


class Nursery:
    """Forks a process per program. Create it before the first item is read. `channel`: sockets that it must not inherit."""

    def __init__(self, limits: Limits, channel: Sequence[socket.socket]) -> None:
        self._limits = limits
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        if os.fork() == 0:
            with leaving():
                for end in (*channel, self._control):
                    end.close()
                _serve(theirs, limits, parent)
        theirs.close()

    def run(self, program: Program, limit_s: float) -> Outcome:
        """Run a program; returns shortly after `limit_s` at the latest. Raises ConnectionError if the nursery is gone."""
        question = program.question
        first = {"setup": program.setup, "source": program.source, "asked": question is not None}
        second = program.stdin if question is None else json.dumps(question)
        files = [os.memfd_create(name) for name in _FILES]
        try:
            for descriptor, text in zip(files, (json.dumps(first), second), strict=False):
                _write(descriptor, text.encode(errors="surrogatepass"))
            socket.send_fds(self._control, [_LIMIT.pack(limit_s)], files)
            reply = self._control.recv(_ENDED.size)
            if not reply:
                raise ConnectionError("the nursery is gone")
            status, late = _ENDED.unpack(reply)
            output, value = (_read(descriptor) for descriptor in files[2:])
        finally:
            for descriptor in files:
                os.close(descriptor)
        return Outcome(status == 0 and not late, output, _value(value))


def _serve(control: socket.socket, limits: Limits, parent: int) -> None:
    """Fork a process for each program, and report how it ended."""
    if not limits.boxed:
        die_with_parent(parent)
    silence(0, 1, 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        request, files, _, _ = socket.recv_fds(control, _LIMIT.size, len(_FILES))
        if not request:
            return
        nursery = os.getpid()
        child = os.fork()
        if child == 0:
            with leaving():
                control.close()
                _run(files, limits, nursery)
        for descriptor in files:
            os.close(descriptor)
        (limit_s,) = _LIMIT.unpack(request)
        control.send(_ENDED.pack(*_wait(child, limit_s, limits.test_timeout_s)))


def _wait(child: int, limit_s: float, processor_s: float) -> tuple[int, bool]:
    """(status, whether it exceeded its time limit): of the wall clock or of CPU time."""
    end, own_clock = time.monotonic() + limit_s, (~child << 3) | _PROCESSOR_CLOCK
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status, False
        left = min(end - time.monotonic(), processor_s - time.clock_gettime(own_clock))
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        signal.sigtimedwait({signal.SIGCHLD}, max(left / _PROCESSORS, _SHORTEST_WAIT_S))


def _run(files: Sequence[int], limits: Limits, parent: int) -> None:
    """Run one program in this process; an exception ends it with exit code 1."""
    program, stdin, stdout, value = files
    first = json.loads(_read(program))
    os.close(program)
    if not limits.boxed:
        die_with_parent(parent)
    os.setsid()
    os.chdir("/tmp" if limits.boxed else "/")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    if not first["asked"]:
        os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdout)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate(("r", "w", "w")))
    sys.argv = ["program.py"]
    sys.setrecursionlimit(_RECURSION)
    rules = seccomp.Rules(processes=False, writing=limits.boxed)
    confine.confine(confine.Limits(limits.memory_mb, limits.test_timeout_s, OUTPUT_MB), rules, boxed=limits.boxed)
    names = _module("solution" if first["asked"] else "__main__")  # a main block reads an input that a call does not have
    try:
        exec(compile(first["setup"], "setup.py", "exec", dont_inherit=True), names)
        exec(compile(first["source"], "program.py", "exec", dont_inherit=True), names)
    except SystemExit:
        if first["asked"]:
            raise
    for thread in threading.enumerate():  # as the interpreter does at exit
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if first["asked"]:
        _write(value, plain.dumps(_answer(json.loads(_read(stdin)), names)).encode())
    atexit._run_exitfuncs()
    sys.stdout.flush()


def _module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__.update(_PRELUDE_NAMES, __name__=name)
    sys.modules[name] = sys.modules["__main__"] = module
    return module.__dict__


def _answer(question: dict[str, Any], names: dict[str, Any]) -> Any:
    if "expression" in question:
        return eval(compile(question["expression"], "test.py", "eval", dont_inherit=True), names)
    if "function" in question:
        solution, name = names.get("Solution"), question["function"]
        return (getattr(solution(), name) if solution is not None else names[name])(*question["arguments"])
    exec(compile(question["script"], "test.py", "exec", dont_inherit=True), names)
    return question["token"]


def _prelude_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    return names


_PRELUDE_NAMES = _prelude_names()


def _value(text: bytes) -> tuple[Any] | None:
    try:
        return (plain.loads(text),) if text else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _write(descriptor: int, data: bytes) -> None:
    """Write all data, and rewind the file."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _read(descriptor: int) -> bytes:
    """Read the file from its start, up to the size that a program may write."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0)
