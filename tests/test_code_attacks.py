"""Programs that attack the code verifier: none passes by anything but its output, and none reaches anything."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import pytest
from programs import ADD, fenced, reward

from megafork.data.reward import Verdict, Verifiers

# ---------------------------------------------------------------- programs that attack

READS_OTHERS = "reads other processes"
PASSES = {  # against an output of `secret-` and eight hexadecimal digits
    "leaves at once": "import os; os._exit(0)",
    "exits": "exit(0)",
    "prints what tests print": "print('OK'); print('1 passed'); print('True')",
    "looks through its memory": """
import gc
print(*{*re.findall('secret-[0-9a-f]{8}', repr([found for found in gc.get_objects() if isinstance(found, (dict, list, str))]))})""",
    "looks through its frames": """
import sys
frame, found = sys._getframe(1), set()
while frame:
    found |= {*re.findall('secret-[0-9a-f]{8}', repr(frame.f_locals) + repr(frame.f_globals))}
    frame = frame.f_back
print(*found)""",
    READS_OTHERS: """
import os
found = set()
for pid in os.listdir('/proc'):
    try:
        for line in open(f'/proc/{pid}/maps'):
            if ' rw' not in line: continue
            start, end = (int(number, 16) for number in line.split()[0].split('-'))
            with open(f'/proc/{pid}/mem', 'rb') as memory:
                memory.seek(start)
                found |= {*re.findall(rb'secret-[0-9a-f]{8}', memory.read(end - start))}
    except (OSError, ValueError): pass
print(*(text.decode() for text in found))""",
    "opens every descriptor": """
import os
for number in range(64):
    try: os.lseek(number, 0, 0); print(os.read(number, 9999).decode())
    except OSError: pass""",
    "writes to every descriptor": """
import os, struct
for number in range(64):
    try: os.write(number, bytes(16) + struct.pack('>d?', 1.0, False))
    except OSError: pass""",
    "never ends": "while True: pass",
    "a thread that never ends": "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "more output than memory": "while True: print('x' * (1 << 20))",
    "takes all memory": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "recursion without end": "def f(): f()\nf()",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "stops its parent": "import os, signal; os.kill(os.getppid(), signal.SIGSTOP)",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal; os.kill(-1, signal.SIGKILL)",
}
REACHES = {  # prints `secret` only if it got through
    "a new process": "import os; os.fork()",
    "a program": "import subprocess; subprocess.run(['/bin/true'])",
    "a process by clone3": "import ctypes; assert ctypes.CDLL(None).syscall(435, 0, 0) == -1 and ctypes.get_errno() != 38 and 0",
    "a socket": "import socket; socket.socket(socket.AF_INET)",
    "a Unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0x')",
    "names": "import socket; socket.getaddrinfo('example.com', 80)",
    "files of the home": "open({home!r} + '/written', 'w').close()",
    "files of the run": "open({cwd!r} + '/written', 'w').close()",
    "removing a file of the run": "os.remove({cwd!r} + '/precious')",
    "a debugger": "import ctypes; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "another process's memory": "open('/proc/%d/mem' % os.getppid(), 'wb').close()",
    "a signal": "os.kill({trainer}, 0)",
    "the environment's secrets": "os.environ['WANDB_API_KEY']",
    "a namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "memory that no limit counts": "os.memfd_create('x')",
}


def test_no_program_passes_by_anything_but_its_output(tool: str) -> None:
    secret = f"secret-{secrets.token_hex(4)}"
    row = {"input_output": {"inputs": [""], "outputs": [secret]}}
    right = (fenced(f"print('{secret[:9]}' + '{secret[9:]}')"), row)
    with Verifiers(reward(memory_mb=256)) as scorer:
        for name, source in PASSES.items():
            if name == READS_OTHERS and tool == "none":
                continue  # only a sandbox promises this
            begin = time.monotonic()
            assert [v.accuracy for v in scorer.score([right, (fenced(source), row), right])] == [1, 0, 1], name
            assert time.monotonic() - begin < 10, name


def test_a_program_reaches_nothing(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    (tmp_path / "precious").write_text("still here")
    row = {"input_output": {"inputs": [""], "outputs": ["secret"]}}
    with Verifiers(reward()) as scorer:
        for name, attack in REACHES.items():
            attack = attack.format(cwd=str(tmp_path), home=str(Path.home()), trainer=os.getpid())
            body = f"import os\n{attack}\nprint('secret')"
            assert scorer.score([(fenced(body), row)]) == [Verdict(0.0)], name
    assert not (tmp_path / "written").exists() and not (Path.home() / "written").exists()
    assert (tmp_path / "precious").read_text() == "still here"


def test_asserts_are_not_passed_by_tricks(tool: str) -> None:
    tricks = [
        "import os; os._exit(0)",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\nexit(0)",
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\ndef f(x): return Any()",
        "import sys\ndef f(x): return sys._getframe(1).f_locals.get('expected')",
    ]
    rows: list[dict[str, Any]] = [{"test_list": ["assert f(2) == 4"]}, {"input_output": {"inputs": [[2]], "outputs": [4], "fn_name": "f"}}]
    with Verifiers(reward()) as scorer:
        for trick in tricks:
            assert scorer.score([(fenced(trick), row) for row in rows]) == [Verdict(0.0)] * 2, trick


@pytest.mark.slow
def test_a_thousand_verdicts_on_two_workers_in_a_minute() -> None:
    row = {"input_output": {"inputs": [f"{n} {n}" for n in range(5)], "outputs": [str(2 * n) for n in range(5)]}}
    with Verifiers(reward(workers=2)) as scorer:
        scorer.score([(fenced(ADD), row)] * 2)
        before, begin = os.times(), time.monotonic()
        assert scorer.score([(fenced(ADD), row)] * 1000) == [Verdict(1.0)] * 1000
    after = os.times()
    elapsed, own = time.monotonic() - begin, after.user + after.system + after.children_user + after.children_system
    own -= before.user + before.system + before.children_user + before.children_system
    assert min(elapsed, own / 2) < 60  # processor time where other programs share the cores
