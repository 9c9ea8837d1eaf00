"""Attacks on the run by code that a model wrote, or by a verifier that runs it: each succeeded once, or is similar to one that did.

Each runs in a bubblewrap sandbox, in an `unshare` sandbox, and without any, as far as that mode gives guarantees.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megafork.data.reward import Item, Verdict, Verifiers, check_verifier
from megafork.data.verdicts import sandbox
from megafork.recipe import RecipeError, Reward

EVALUATES = """
import ctypes, gc, glob, inspect, os, pathlib, resource, signal, socket, struct, subprocess, sys, threading, time

def score(response, row):
    names = dict(globals(), row=row, reached=False)
    exec(response, names)
    return float(names["reached"])
"""
RIGHT: Item = ("reached = True", {})
WRONG: Item = ("reached = False", {})

# Each sets `reached` if it got through.
EVERYWHERE = """
messages = [bytes(16) + struct.pack(">d", 1.0), b"\\0\\0\\x10\\0abc", b"", b"x" * 200_000]
for descriptor in map(int, os.listdir("/proc/self/fd")):
    for message in messages * 2:
        try:
            if descriptor > 2: os.write(descriptor, message)
        except OSError: pass
"""
ON_THE_CHANNEL = {
    "fork": "os.fork()",
    "fork twice and leave": "os.fork() or os.setsid() or os.fork(); os._exit(0)",
    "messages of every form to every descriptor": EVERYWHERE,
    "the same from a thread that never ends": "def f():\n while True: exec(" + repr(EVERYWHERE) + ", globals())\n"
    "threading.Thread(target=f).start()",
    "sockets found by gc": """
for found in gc.get_objects():
    if isinstance(found, socket.socket):
        try: found.send(bytes(16) + struct.pack('>d', 1.0))
        except OSError: pass""",
    "numbers found in frames": """
for frame in inspect.stack():
    for value in list(frame.frame.f_locals.values()):
        if isinstance(value, bytes) and len(value) == 16:
            for descriptor in range(3, 64):
                try: os.write(descriptor, value + struct.pack('>d', 1.0)); os.write(descriptor, value + struct.pack('>d', 1.0))
                except OSError: pass
os._exit(0)""",
    "close every descriptor": "os.closerange(0, 1000)",
    "half a message, then sleep": EVERYWHERE + "time.sleep(100)",
    "stop the judge": "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(100)",
    "kill the judge": "os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)",
    "never ends": "while True: pass",
    "segfault": "ctypes.string_at(0)",
    "more output than a disk": "print('x' * (1 << 26), flush=True)",
    "exit": "sys.exit(0)",
    "leave": "os._exit(0)",
    "thread that never ends": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "memory": "x = bytearray(1 << 40)",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(1 << 26))",
}
ON_THE_MACHINE = {
    "fork bomb": "while True:\n try: os.fork()\n except OSError: pass",
    "memory of many processes": "for _ in range(5): os.fork()\nx = bytearray(b'x' * (1 << 28)); time.sleep(100)",
    "thread bomb": "threading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "kill process 1": "os.kill(1, signal.SIGKILL); os.kill(1, signal.SIGSTOP); time.sleep(100)",
    "kill everything": "os.kill(-1, signal.SIGKILL); time.sleep(100)",
    "fill the scratch folder": "f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()",
    "many files": "for n in range(10**7): os.close(os.open(f'/tmp/{n}', os.O_CREAT))",
    "a folder that cannot be removed": "os.makedirs('/tmp/a/b'); open('/tmp/a/b/c', 'w').close(); os.chmod('/tmp/a', 0)",
    "folders thousands deep": "os.chdir('/tmp')\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')",
    "files for the next item": "open('/tmp/next', 'w').close(); open('/dev/shm/next', 'w').close()",
}
REACHES = {
    "files of the working directory": "open('written', 'w').close(); reached = True",
    "files of the home": "open(os.path.expanduser('~root/written') if os.getuid() == 0 else row['home'], 'w').close(); reached = True",
    "files of the system": "open('/usr/written', 'w').close(); reached = True",
    "settings of the kernel": "open('/proc/sys/kernel/hostname', 'w').write('x'); reached = True",
    "devices": "os.mknod('/tmp/device', 0o60600, os.makedev(8, 0)); reached = True",
    "a port of this machine": "socket.create_connection(('127.0.0.1', row['port']), timeout=2); reached = True",
    "names": "socket.getaddrinfo('example.com', 80); reached = True",
    "a Unix socket by its path": "socket.socket(socket.AF_UNIX).connect(row['path']); reached = True",
    "a Unix socket by its name": "socket.socket(socket.AF_UNIX).connect('\\0' + row['name']); reached = True",
    "memory of the judge": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1); reached = True",
    "descriptors of the judge": "os.readlink(f'/proc/{os.getppid()}/fd/0'); reached = True",
    "memory of the keeper": "open('/proc/1/mem', 'rb').read(1); reached = True",
    "the judge by a debugger": "reached = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "processes of the run": "reached = os.path.exists(f'/proc/{row[\"trainer\"]}/environ')",
    "the environment's secrets": "reached = any(b'hunter2' in open(f, 'rb').read() for f in glob.glob('/proc/[0-9]*/environ'))",
    "the environment": "reached = 'WANDB_API_KEY' in os.environ",
    "a new namespace": "reached = ctypes.CDLL(None).unshare(0x10000000) == 0",
    "temporary files of others": "reached = os.path.exists(row['temporary'])",
    "no limit of memory": "reached = resource.getrlimit(resource.RLIMIT_AS)[0] == -1",
    "an older limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); reached = True",
    "what the last item left": "reached = os.path.exists('/tmp/next') or os.path.exists('/dev/shm/next')",
}


@pytest.fixture
def boxed(tool: str) -> str:
    if tool == "none":
        pytest.skip("only a sandbox promises this")
    return tool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    (tmp_path / "v.py").write_text(EVALUATES)
    return tmp_path


def reward(verifier: str = "v.py:score", **keys: object) -> Reward:
    return Reward.model_validate({"verifier": verifier, "timeout_s": 1.5, "memory_mb": 512, **keys})


@pytest.fixture
def targets(folder: Path) -> Iterator[dict[str, object]]:
    """A row that says where there is something to reach."""
    name = f"megafork-test-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(family)) for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_UNIX)]
        addresses: list[Any] = [("127.0.0.1", 0), "socket", f"\0{name}"]
        for listening, address in zip(sockets, addresses, strict=True):
            listening.bind(address)
            listening.listen()
        temporary = Path(stack.enter_context(_temporary_folder()))
        yield {
            "port": sockets[0].getsockname()[1],
            "path": str(folder / "socket"),
            "name": name,
            "home": str(Path.home() / "written"),
            "trainer": os.getpid(),
            "temporary": str(temporary),
        }


def _temporary_folder() -> contextlib.AbstractContextManager[str]:
    import tempfile

    return tempfile.TemporaryDirectory(dir="/tmp")


# ---------------------------------------------------------------- the channel of verdicts


@pytest.mark.slow
def test_an_attack_on_the_channel_costs_its_own_item_alone(folder: Path, tool: str) -> None:
    with Verifiers(reward()) as scorer:
        for name, attack in ON_THE_CHANNEL.items():
            begin = time.monotonic()
            verdicts = scorer.score([RIGHT, (attack, {}), WRONG, RIGHT, WRONG, RIGHT])
            assert [verdict.accuracy for verdict in (verdicts[0], *verdicts[2:])] == [1, 0, 1, 0, 1], (name, verdicts)
            assert verdicts[1].accuracy == 0.0 or "frames" in name, (name, verdicts)  # what runs beside a verifier may judge itself
            assert time.monotonic() - begin < 12, name


def test_an_installation_below_tmp_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a checkout is installed in place, no entry of `sys.path` names it, and /tmp is hidden otherwise."""
    package = Path("/tmp") / f"megafork-test-{os.getpid()}" / "megafork"
    package.mkdir(parents=True)
    try:
        monkeypatch.setattr(sandbox.megafork, "__file__", str(package / "__init__.py"))
        for verifier in (None, tmp_path / "v.py"):
            assert str(package) in sandbox.view(verifier).read_only
    finally:
        package.rmdir()
        package.parent.rmdir()


@pytest.mark.slow
def test_what_a_sandbox_bounds(folder: Path, boxed: str) -> None:
    before = _verifier_processes()
    with Verifiers(reward()) as scorer:
        for name, attack in ON_THE_MACHINE.items():
            begin = time.monotonic()
            verdicts = scorer.score([(attack, {}), RIGHT, WRONG, (REACHES["what the last item left"], {})])
            assert [verdict.accuracy for verdict in verdicts] == [0, 1, 0, 0], (name, verdicts)
            assert time.monotonic() - begin < 20, name
    assert len(_verifier_processes() - before) < 20


def _verifier_processes() -> set[int]:
    """Anybody's; what an attack has forked is called the same."""
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any("verdicts.worker" in word for word in process.info["cmdline"] or ())
    }


def test_nothing_outside_is_reached(boxed: str, targets: dict[str, object]) -> None:
    with Verifiers(reward()) as scorer:
        for name, attack in REACHES.items():
            (verdict,) = scorer.score([(attack, targets)])
            assert verdict.accuracy == 0.0, (name, verdict)
    assert not Path("written").exists() and not (Path.home() / "written").exists()


@pytest.mark.parametrize("start", ["start_new_session=True", "process_group=0", ""])
def test_nothing_outlives_its_item(folder: Path, tool: str, start: str) -> None:
    """Nor the run: what is left is ended with the item, before the next."""
    seconds = f"{4000 + os.getpid() % 997}"
    attack = f"subprocess.Popen(['/bin/sleep', '{seconds}'], {start}); reached = True"
    detached = (
        f"os.fork() or os.setsid() and (os.fork() and os._exit(0)) or os.execv('/bin/sleep', ['/bin/sleep', '{seconds}'])\nreached = True"
    )
    with Verifiers(reward()) as scorer:
        assert scorer.score([(attack, {}), (detached, {}), RIGHT]) == [Verdict(1.0)] * 3
        assert _gone(seconds)


def test_kill_9_of_the_trainer_leaves_nothing(folder: Path, boxed: str) -> None:
    seconds = f"{5000 + os.getpid() % 997}"
    attack = f"subprocess.Popen(['/bin/sleep', '{seconds}'], start_new_session=True); time.sleep(100)"
    script = (
        "from megafork.data.reward import Verifiers; from megafork.recipe import Reward\n"
        f"with Verifiers(Reward(verifier='v.py:score', timeout_s=100)) as scorer: scorer.score([({attack!r}, {{}})])"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script])
    assert _wait(lambda: _running(seconds))
    trainer.kill()
    trainer.wait()
    assert _gone(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 1 << 24])
def test_a_stopped_process_and_an_item_larger_than_a_buffer_are_bounded(folder: Path, tool: str, size: int) -> None:
    with Verifiers(reward()) as scorer:
        assert scorer.score([RIGHT]) == [Verdict(1.0)]
        for process in psutil.Process().children(recursive=True):
            process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert scorer.score([("#" * size, {})]) == [Verdict(0.0, "timeout: no verdict within 1.5 s")]
        assert time.monotonic() - begin < 6
        assert scorer.score([RIGHT, WRONG, ("reached = True #" + "#" * size, {})]) == [Verdict(1.0), Verdict(0.0), Verdict(1.0)]


@pytest.mark.slow
def test_running_out_of_time_costs_no_new_start(folder: Path, tool: str) -> None:
    (folder / "slow.py").write_text("import time\ntime.sleep(3)\n" + EVALUATES)
    with Verifiers(reward("slow.py:score", timeout_s=0.5)) as scorer:
        begin = time.monotonic()
        verdicts = scorer.score([("time.sleep(100)", {})] * 4 + [RIGHT])
    assert [verdict.accuracy for verdict in verdicts] == [0, 0, 0, 0, 1]
    assert time.monotonic() - begin < 4 * 0.5 + 3


def test_an_error_is_one_printable_line(folder: Path, tool: str) -> None:
    with Verifiers(reward()) as scorer:
        (verdict,) = scorer.score([("raise ValueError('\\x1b[2J\\r\\n' + 'x' * 10**6)", {})])
    assert verdict.error is not None and verdict.error.startswith("ValueError: ?[2J xxx") and len(verdict.error) == 300


# ---------------------------------------------------------------- which isolation


def test_full_is_refused_where_it_cannot_be_had(folder: Path, tool: str) -> None:
    if tool == "none":
        with pytest.raises(RecipeError, match=r"^reward.isolation is 'full': this machine has no .*; install bubblewrap"):
            check_verifier(reward(isolation="full"))
    else:
        check_verifier(reward(isolation="full"))


def test_a_file_that_is_trusted_keeps_its_state_its_network_and_its_environment(targets: dict[str, object], folder: Path) -> None:
    """As a judge that is a language model needs it; its threads, made when it is imported, run."""
    (folder / "judge.py").write_text(
        EVALUATES + "import threading\ncount = [0]\nevent = threading.Event()\nthreading.Thread(target=event.set, daemon=True).start()\n"
        "def lasting(response, row):\n    count[0] += 1\n    event.wait(2)\n    open('written', 'a').close()\n"
        "    socket.create_connection(('127.0.0.1', row['port']), timeout=2)\n"
        "    return count[0] / 4 if event.is_set() and os.environ['WANDB_API_KEY'] else 0\n"
    )
    with Verifiers(reward("judge.py:lasting", isolation="process")) as scorer:
        assert scorer.score([("", targets)] * 3) == [Verdict(0.25), Verdict(0.5), Verdict(0.75)]
    assert Path("written").exists()


def test_a_built_in_verifier_sees_nothing_of_the_run(folder: Path, boxed: str) -> None:
    program = f"import os; print(any(map(os.path.exists, {[str(folder), str(Path(__file__)), str(Path.home() / '.ssh')]})))"
    row = {"answer": "", "input_output": {"inputs": [""], "outputs": ["False"]}}
    with Verifiers(reward("code")) as scorer:
        assert scorer.score([(f"```python\n{program}\n```", row)]) == [Verdict(1.0)]


def _running(seconds: str) -> bool:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:2] == ["/bin/sleep", seconds] and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _gone(seconds: str) -> bool:
    return _wait(lambda: not _running(seconds))


def _wait(condition: object, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False
