"""The judge of a verifier process (`worker.py`): it reads items and answers each with a verdict.

It runs itself only verifiers that never execute what a model wrote (`exact`, `math`, most tasks of reasoning-gym), and a user's file under
`reward.isolation: process`. Other verifiers run in a separate child for each item, without access to the trainer's channel or to this
process: a user's file, which may do anything with an answer, and the tasks of reasoning-gym that evaluate it. For `code`, each test's
program runs in its own process (`runner.py`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megafork.data import verifiers
from megafork.data.verdicts import confine, sandbox, seccomp, wire
from megafork.data.verdicts.processes import end_all_but_me, leaving, silence
from megafork.process import die_with_parent

Judging = Callable[[str, verifiers.Row], wire.Plain]


@dataclass(frozen=True)
class Options:
    """Options of a verifier process, from the recipe's `reward` section."""

    verifier: str
    boxed: bool
    """Whether it runs in a sandbox."""
    lasting: bool
    """Whether the judge itself loads and runs a user's file for all items."""
    timeout_s: float
    test_timeout_s: float
    memory_mb: int
    partial: bool
    kept: Sequence[str]
    """Paths of the sandbox's view that are in its scratch folders."""

    @property
    def own_file(self) -> bool:
        """Whether the verifier is in a user's file."""
        return ":" in self.verifier


def serve(options: Options, loaded: verifiers.Verifier | None, items: socket.socket, verdicts: socket.socket) -> None:
    """Judge items until the trainer closes its end. `loaded`: the verifier; None: load it here."""
    if not options.boxed:
        die_with_parent(os.getppid())
        confine.adopt_orphans()
    if loaded is None:
        try:
            loaded = verifiers.load(options.verifier)
        except BaseException as error:  # noqa: BLE001 - a user's file may raise anything, SystemExit included
            wire.send_word(verdicts, describe(error))
            return
    judging = _judging(options, loaded, (items, verdicts))
    if options.own_file and not options.lasting:
        # once for all children, who inherit it: for each it would take as long as everything else
        rules = seccomp.Rules(processes=True, writing=True) if seccomp.supported() else None
        confine.confine_own_file(_limits(options), rules)
    else:
        confine.limit_memory(options.memory_mb)
    wire.send_word(verdicts, wire.READY)
    with items.makefile("rb") as file:
        while (item := wire.receive_item(file)) is not None:
            number, response, row = item
            verdict = judging(response, row)
            last = not empty_scratch(options)
            wire.send_verdict(verdicts, number, verdict._replace(last=last))
            if last:
                return


def _judging(options: Options, loaded: verifiers.Verifier, channel: tuple[socket.socket, ...]) -> Judging:
    if options.verifier == "code":
        from megafork.data.verdicts.code import Grader
        from megafork.data.verdicts.runner import Limits

        return Grader(options.timeout_s, Limits(options.test_timeout_s, options.memory_mb, options.boxed), channel, partial=options.partial)

    def judge(response: str, row: verifiers.Row) -> wire.Plain:
        if options.lasting or not verifiers.evaluates(options.verifier, row):
            return verdict(loaded, response, row)
        return _in_child(options, loaded, response, row, channel)

    return judge


def verdict(verifier: verifiers.Verifier, response: str, row: verifiers.Row) -> wire.Plain:
    """The verifier's verdict, or its error."""
    try:
        accuracy = _number(verifier(response, row))
    except BaseException as error:  # noqa: BLE001 - one bad answer must not end the run
        return wire.Plain(0.0, describe(error))
    if not 0.0 <= accuracy <= 1.0:  # also rejects NaN
        return wire.Plain(0.0, f"the verifier returned {accuracy}: an accuracy is between 0 and 1")
    return wire.Plain(accuracy)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _number(value: Any) -> float:
    if not hasattr(value, "__float__"):  # refuses text that float() would parse
        raise TypeError(f"the verifier returned {value!r:.100}: it must be a number or a bool")
    return float(value)


def _in_child(
    options: Options, verifier: verifiers.Verifier, response: str, row: verifiers.Row, channel: tuple[socket.socket, ...]
) -> wire.Plain:
    """The verdict of a separate process, ended afterwards with all it started. If it is late, the trainer has both processes ended."""
    ours, theirs = wire.datagram_sockets()
    number = wire.new_number()
    with ours:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            with leaving():
                for end in (*channel, ours):
                    end.close()
                _confine(options, parent)
                wire.send_verdict(theirs, number, verdict(verifier, response, row))
        theirs.close()
        message = ours.recv(wire.LONGEST + 1)
    if message:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    end_all_but_me(boxed=options.boxed)
    if not message:
        return wire.Plain(0.0, wire.how_it_ended(os.waitstatus_to_exitcode(status)))
    return wire.unpack(message, number) or wire.Plain(0.0, "the verifier sent an invalid verdict")


def _confine(options: Options, parent: int) -> None:
    """Confine a child. One that runs a user's file inherits it from the judge, except for the limit of its own CPU time."""
    if not options.boxed:
        die_with_parent(parent)
    cpu_s = options.timeout_s * (os.cpu_count() or 1)
    if options.own_file:
        confine.limit_cpu(cpu_s)
        if options.boxed:
            confine.show()
        return
    silence(1, 2)
    rules = seccomp.Rules(processes=False, writing=options.boxed)
    confine.confine(_limits(options, cpu_s), rules, boxed=options.boxed)


def _limits(options: Options, cpu_s: float | None = None) -> confine.Limits:
    return confine.Limits(options.memory_mb, cpu_s, sandbox.SCRATCH_MB)


def empty_scratch(options: Options) -> bool:
    """Empty the scratch folders; returns whether nothing of the last item is left."""
    try:
        for folder in sandbox.SCRATCH if options.boxed else ():
            _empty(folder, options.kept)
    except (OSError, RecursionError):  # folders without permissions, or nested thousands deep
        return False
    return True


def _empty(folder: str, kept: Sequence[str]) -> None:
    for entry in os.scandir(folder):
        if any(path == entry.path for path in kept):
            continue
        if any(path.startswith(entry.path + "/") for path in kept):
            _empty(entry.path, kept)
        elif entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
