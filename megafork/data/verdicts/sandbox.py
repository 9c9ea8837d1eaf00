"""The sandbox of a verifier process: separate namespaces, made by bubblewrap or, if that is missing, by util-linux's `unshare`.

Inside, there is no network and no other process. Files are read-only, except for scratch folders in memory. A built-in verifier sees the
system's libraries and Python, and nothing of the run: neither its data, which holds the answers, nor a home folder. A user's verifier sees
all files, as its data may be anywhere, but no sockets or temporary files of other programs (/run, /tmp, /dev/shm).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import megafork

SCRATCH_MB = 256
SCRATCH = ("/tmp", "/dev/shm")
"""The writable in-memory folders, emptied after each item."""
DEVICES = ("null", "zero", "full", "random", "urandom")
_LIBRARIES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store")
_ETC = ("alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "nsswitch.conf", "passwd", "timezone")
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV", "OMP_NUM_THREADS")
_PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}
_PROBE_LIMIT_S = 20.0
TOOLS = ("bwrap", "unshare")


@dataclass(frozen=True)
class View:
    """Contents of the sandbox: `read_only` paths under their own names, and the working directory `folder`; everything else is new."""

    read_only: tuple[str, ...]
    folder: str


def available() -> str | None:
    """The tool for full isolation on this machine: the path of `bwrap` or `unshare`, or None if neither can make namespaces."""
    found = (shutil.which(name) for name in TOOLS)
    return next((path for path in found if path is not None and _works(path)), None)


def view(verifier_file: Path | None) -> View:
    """The view for a built-in verifier (None), or for one in a user's file."""
    python, ours = _python(), str(Path(megafork.__file__).parent)
    if verifier_file is None:
        libraries = [*_LIBRARIES, *(f"/etc/{name}" for name in _ETC), *_library_path()]
        return View(_existing([*libraries, *python, ours]), SCRATCH[0])
    here = Path.cwd()
    hidden = [path for path in (*python, *sys.path, ours, str(here), str(verifier_file.resolve().parent)) if _is_hidden(path)]
    return View(_existing(["/", *hidden]), str(here))


def command(tool: str, seen: View, worker: list[str]) -> list[str]:
    """The command that runs `worker` (a Python command line) in the sandbox, as process 1, until the thread that starts it ends.

    `unshare` makes only the namespaces: `mounts.enter` must then be called inside with the view, which is passed as the last argument.
    """
    if Path(tool).name == "bwrap":
        return [*_bubblewrap(tool, seen), *worker, ""]
    namespaces = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child=KILL"]
    setpriv = [shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL", "--"]
    return [*setpriv, tool, *namespaces, "--", *worker, json.dumps(asdict(seen))]


def compile_packages(verifier: str) -> None:
    """Compile a built-in verifier's packages to bytecode unless that exists: the sandbox cannot write it, which would add seconds to each
    start."""
    spec = importlib.util.find_spec(_PACKAGES[verifier]) if verifier in _PACKAGES else None
    if spec is None or spec.cached is None or os.path.exists(spec.cached) or not os.access(os.path.dirname(spec.origin or ""), os.W_OK):
        return
    script = "import sys; from megafork.data import verifiers; verifiers.load(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, verifier], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def environment(*, boxed: bool) -> dict[str, str]:
    """The variables that Python and its libraries need, and none of the run's secrets."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    home = {"HOME": SCRATCH[0], "TMPDIR": SCRATCH[0]} if boxed else {}
    source = str(Path(megafork.__file__).parent.parent)
    path = os.pathsep.join([source, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))])
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **kept, **home, "PYTHONPATH": path}


def _bubblewrap(tool: str, seen: View) -> list[str]:
    size = str(SCRATCH_MB << 20)
    first, hidden = split(seen.read_only)
    return [
        *(tool, "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--die-with-parent", "--as-pid-1", "--cap-drop", "ALL"),
        *_ro_binds(first),
        *("--dev", "/dev", "--size", size, "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--proc", "/proc", "--remount-ro", "/proc", "--size", size, "--perms", "1777", "--tmpfs", "/tmp"),
        *("--size", "1048576", "--tmpfs", "/run"),
        *_ro_binds(hidden),
        *("--remount-ro", "/run", "--remount-ro", "/", "--chdir", seen.folder, "--"),
    ]


def split(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split the paths to mount into those before the new folders, and those that these would hide, to mount afterwards."""
    every = list(paths)
    return [path for path in every if not _is_hidden(path)], [path for path in every if _is_hidden(path)]


def _is_hidden(path: str) -> bool:
    return Path(path).is_absolute() and Path(path).parts[1:2] in (("tmp",), ("run",), ("dev",))


def _ro_binds(paths: Iterable[str]) -> list[str]:
    return [word for path in paths for word in ("--ro-bind", path, path)]


def _python() -> list[str]:
    """Folders of this interpreter, its standard library and installed packages, and each link on the path to its executable."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    hops, link = [Path(sys.executable)], Path(sys.executable)
    while link.is_symlink():
        link = link.parent / link.readlink()
        hops.append(link)
    roots = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *packages]
    return [*roots, *(os.path.realpath(root) for root in roots), *(str(hop.parent) for hop in hops)]


def _library_path() -> list[str]:
    return [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if os.path.isabs(path)]


def _existing(paths: Iterable[str]) -> tuple[str, ...]:
    """The existing paths, without duplicates, outer folders before inner ones."""
    return tuple(sorted({os.path.normpath(path) for path in paths if os.path.exists(path)}))


@functools.cache
def _works(tool: str) -> bool:
    """Whether Python starts inside: a tool may be installed although the kernel or a container's policy forbids its use."""
    worker = [sys.executable, "-m", "megafork.data.verdicts.mounts"]
    try:
        ended = subprocess.run(
            command(tool, view(None), worker),
            env=environment(boxed=True),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0
