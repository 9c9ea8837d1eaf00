"""A verifier process: `python -m megafork.data.verdicts.worker CONTROL PARENT OPTIONS VIEW`, started by `reward.py`, never by hand.

This process, the keeper, loads the verifier and never reads an item. On the trainer's request it ends the current judge with all its
descendants and forks a new one (`judge.py`), which reads and answers items. In a sandbox the keeper is process 1, so nothing inside can
stop it. It starts in a tenth of a second, as it imports neither torch nor the recipe.

Requests over the socket CONTROL: STUCK or ENDED (`wire.py`), the state of the last judge, with the two sockets of the next one. Answers:
first READY or the reason why the verifier cannot be loaded; then, for each request, how the last judge ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass, field

from megafork.data import verifiers
from megafork.data.verdicts import confine, judge, mounts, sandbox, wire
from megafork.data.verdicts.processes import end_all_but_me, leaving
from megafork.process import die_with_parent

_TICK_S = 0.05
_END_LIMIT_S = 1.0
_MOST_THREADS = 256
_MOST_FILES = 20_000
_MARGIN_MB = 64
_PAGE = resource.getpagesize()


def main() -> None:
    control_fd, parent, text, view = sys.argv[1:]
    options = judge.Options(**json.loads(text))
    if options.boxed:
        mounts.enter(view)
        if os.getpid() != 1:  # `end_all_but_me` would kill unrelated processes
            raise SystemExit("a verifier in a sandbox must be its process 1")
    else:
        die_with_parent(int(parent))
        confine.adopt_orphans()
    confine.hide()
    control = socket.socket(fileno=int(control_fd))
    try:
        loaded = None if options.lasting else verifiers.load(options.verifier)
    except BaseException as error:  # noqa: BLE001 - a user's file may raise anything, SystemExit included
        wire.send_word(control, judge.describe(error))
        return
    wire.send_word(control, wire.READY)
    _Keeper(control, options, loaded).serve()


@dataclass
class _Keeper:
    control: socket.socket
    options: judge.Options
    loaded: verifiers.Verifier | None
    judge: int = 0
    """The judge's process id; 0 if there is none."""
    ended: str = ""
    """How the last judge ended, if it was not ended by the trainer."""
    own_mb: float = field(default_factory=lambda: _resident_mb(os.getpid()))

    def serve(self) -> None:
        """Answer requests until the trainer closes its end or a scratch folder cannot be emptied."""
        wake, waker = os.pipe()
        for end in (wake, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # makes the signal wake `select`
        while True:
            readable, _, _ = select.select([self.control.fileno(), wake], [], [], _TICK_S if self.options.boxed else None)
            if wake in readable:
                os.read(wake, 4096)
            self._reap()
            if self.control.fileno() in readable:
                word, descriptors, _, _ = socket.recv_fds(self.control, 16, 2)
                if word == wire.ENDED.encode():
                    self._await_end(wake)
                self._end_all()
                if not word or not judge.empty_scratch(self.options):
                    return
                how, self.ended = self.ended, ""
                self._fork(descriptors)
                wire.send_word(self.control, how)
            elif self.options.boxed:
                self._guard()

    def _fork(self, descriptors: list[int]) -> None:
        self.judge = os.fork()
        if self.judge:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        with leaving():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            try:
                items, verdicts = (socket.socket(fileno=descriptor) for descriptor in descriptors)
                judge.serve(self.options, self.loaded, items, verdicts)
            except (KeyboardInterrupt, ConnectionError):  # the run ends
                pass
            except Exception:
                traceback.print_exc()
                raise

    def _end_all(self) -> None:
        """End all descendants. In a sandbox this also waits for them: orphans become children of process 1."""
        end_all_but_me(boxed=self.options.boxed)
        self._reap(0 if self.options.boxed else os.WNOHANG)

    def _reap(self, how: int = os.WNOHANG) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, how))[0]:
                if ended[0] == self.judge:
                    self.judge, self.ended = 0, self.ended or wire.how_it_ended(os.waitstatus_to_exitcode(ended[1]))

    def _await_end(self, wake: int) -> None:
        """Wait for the judge to end: its sockets close a moment earlier."""
        if self.judge:
            select.select([wake], [], [], _END_LIMIT_S)
            self._reap()

    def _guard(self) -> None:
        """End everything in the sandbox if its total use is excessive, which per-process limits cannot bound."""
        excess = self._excess()
        if excess:
            self.ended = f"the verifier was ended: {excess}"
            self._end_all()

    def _excess(self) -> str | None:
        running = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        if sum(map(_threads, running)) > _MOST_THREADS:
            return f"more than {_MOST_THREADS} threads and processes"
        if sum(_resident_mb(pid) - self.own_mb for pid in running) > self.options.memory_mb + _MARGIN_MB:
            return f"more than reward.memory_mb ({self.options.memory_mb}) of memory"
        for folder in sandbox.SCRATCH:
            state = os.statvfs(folder)
            if state.f_files - state.f_ffree > _MOST_FILES:
                return f"more than {_MOST_FILES} temporary files"
        return None


def _threads(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2
    except OSError:  # the process has ended
        return 0


def _resident_mb(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE / 2**20
    except (OSError, IndexError):  # the process has ended
        return 0.0


if __name__ == "__main__":
    main()
