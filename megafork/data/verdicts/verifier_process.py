"""The trainer's end of one verifier process: a keeper (`worker.py`), sandboxed if possible (`sandbox.py`), with a judge (`judge.py`) that
it forks once the verifier is loaded. A judge that is late or gone is replaced in milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

from megafork import recipe
from megafork.data.verdicts import sandbox, wire
from megafork.data.verdicts.judge import Options
from megafork.data.verdicts.relay import relay
from megafork.recipe import Key, RecipeError
from megafork.user_code import split

Item = tuple[str, dict[str, Any]]
START_LIMIT_S = 120.0
"""Seconds that loading a verifier may take; generous, as a user's file may import anything from a shared disk."""
_REPLACE_LIMIT_S = 2.0
"""Seconds that a keeper may take to end a judge and fork the next one; a slower keeper is killed."""


@dataclass(frozen=True)
class Verdict:
    """`accuracy` in [0, 1], which is 0 if there is an `error`, a single line."""

    accuracy: float
    error: str | None = None


class VerifierProcess:
    """Starts immediately; `await_ready` must follow. It dies with the thread that created it. Not thread-safe."""

    def __init__(self, reward: recipe.Reward, tool: str | None) -> None:
        """`tool`: the program that makes the sandbox (`sandbox.available`), or None."""
        self._reward = reward
        self._tool = tool
        self._control: socket.socket
        self._items: socket.socket
        self._verdicts: socket.socket
        self._ready = self._forked = False
        self._start()

    def await_ready(self) -> None:
        """Wait until a judge is ready for items. Raises RecipeError if the verifier cannot be loaded."""
        deadline = time.monotonic() + START_LIMIT_S
        try:
            failure = wire.receive_word(self._control, deadline) if not self._forked else wire.READY
            if failure == wire.READY:
                if not self._forked:
                    self._fork_judge(wire.STUCK, deadline)
                failure = wire.receive_word(self._verdicts, deadline)
        except TimeoutError:
            failure = f"still not loaded after {START_LIMIT_S:.0f} s"
        except (EOFError, OSError):
            failure = self._how_it_ended()
        if failure != wire.READY:
            self.close()
            raise RecipeError(
                Key("reward.verifier"), f" is {self._reward.verifier!r}: it cannot be loaded; fix the file or its imports ({failure})"
            )
        self._ready = True

    def judge(self, item: Item) -> Verdict:
        """The verdict, within `reward.timeout_s` of a judge being ready. If the judge is late or gone, the next item gets a new one."""
        if self._ready and self._gone():  # it died while idle, which is not this item's fault
            self._replace_judge(wire.ENDED)
        if not self._ready:
            self.await_ready()
        number, deadline = wire.new_number(), time.monotonic() + self._reward.timeout_s
        try:
            wire.send_item(self._items, number, *item, deadline)
            found = wire.receive_verdict(self._verdicts, number, deadline)
        except TimeoutError:
            self._replace_judge(wire.STUCK)
            return Verdict(0.0, f"timeout: no verdict within {self._reward.timeout_s:g} s")
        except (EOFError, OSError):
            return Verdict(0.0, self._replace_judge(wire.ENDED) or "the verifier process closed its channel")
        if found.last:
            self._replace_judge(wire.ENDED)
        return Verdict(found.accuracy, found.error or None)

    def close(self) -> None:
        """End the process and all it started."""
        for end in (self._items, self._verdicts, self._control):
            end.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_REPLACE_LIMIT_S if self._forked else 0.0)
        self._kill()

    def _start(self) -> None:
        name, boxed = self._reward.verifier, self._tool is not None
        own_file = split(name)[0] if ":" in name else None
        lasting = own_file is not None and self._reward.isolation == "process"
        seen = sandbox.view(own_file)
        options = Options(
            verifier=name,
            boxed=boxed,
            lasting=lasting,
            timeout_s=self._reward.timeout_s,
            test_timeout_s=self._reward.test_timeout_s,
            memory_mb=self._reward.memory_mb,
            partial=self._reward.partial,
            kept=[path for path in seen.read_only if path.startswith(tuple(f"{folder}/" for folder in sandbox.SCRATCH))],
        )
        self._ready = self._forked = False
        self._control, theirs = wire.datagram_sockets()
        self._items, self._verdicts = socket.socketpair()  # replaced by the first judge's
        with theirs:
            worker = [sys.executable, "-m", "megafork.data.verdicts.worker", str(theirs.fileno()), str(os.getpid())]
            worker.append(json.dumps(dataclasses.asdict(options)))
            self._process = subprocess.Popen(
                sandbox.command(self._tool, seen, worker) if self._tool else [*worker, ""],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # a verifier's prints are messages, not the run's output
                stderr=subprocess.STDOUT,
                env=None if lasting else sandbox.environment(boxed=boxed),
                start_new_session=True,  # a separate process group, for `_kill`
            )
        threading.Thread(target=relay, args=(self._process.stdout,), daemon=True, name="verifier's messages").start()

    def _fork_judge(self, became: str, deadline: float) -> str:
        """Have the judge ended (`became`: STUCK or ENDED) and another forked; returns how it ended, or "" if it was ended by this call.

        Each judge has its own sockets, so that half an item, or a verdict in transit, never reaches the next one.
        """
        for end in (self._items, self._verdicts):
            end.close()
        self._ready, self._forked = False, True
        self._items, items = socket.socketpair()
        self._verdicts, verdicts = wire.datagram_sockets()
        with items, verdicts:
            socket.send_fds(self._control, [became.encode()], [items.fileno(), verdicts.fileno()])
        return wire.receive_word(self._control, deadline)

    def _replace_judge(self, became: str) -> str:
        try:
            return self._fork_judge(became, time.monotonic() + _REPLACE_LIMIT_S)
        except (TimeoutError, EOFError, OSError):  # the keeper is stuck or gone too
            how = self._how_it_ended()
            self._kill()
            self._control.close()
            self._start()
            return how

    def _gone(self) -> bool:
        """Whether the judge has closed its end. Between two items there should be nothing else to read; anything there is discarded."""
        self._verdicts.settimeout(0.0)
        with contextlib.suppress(BlockingIOError):
            while self._verdicts.recv(wire.LONGEST):
                pass
            return True
        return False

    def _kill(self) -> None:
        """Send SIGKILL to the process and all it started: nothing else ends one that is stuck in C code."""
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._process.pid).children(recursive=True) if self._tool is None else []
        with contextlib.suppress(ProcessLookupError):  # it and its children may have ended already
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the verifier process closed its channel"
        return wire.how_it_ended(code)
