"""What docs/install.md promises, as far as testable without GPU or network: the Makefile's two stacks, the Dockerfile, the builds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The Dockerfile can't be built where the tests run: no image can be had.
INSTRUCTIONS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of a `make test` around this
    return subprocess.run(words, cwd=cwd, env={**outer, **env}, capture_output=True, text=True, timeout=120)


def bash_accepts(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for file in ("Makefile", "requirements.txt", "requirements-cuda.txt", "pyproject.toml"):
        shutil.copy2(ROOT / file, tmp_path)
    return tmp_path


def stamp(checkout: Path, name: str, age_s: float = 0) -> None:
    file = checkout / ".venv" / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    os.utime(file, (time.time() - age_s,) * 2)


def lists(checkout: Path, target: str) -> set[str]:
    """The lists that `make TARGET` would install."""
    return set(re.findall(r"-r (\S+)", run("make", "-n", target, cwd=checkout).stdout))


def test_the_cpu_stack_is_what_everything_but_cuda_takes(checkout: Path) -> None:
    for target in ("quickstart", "test", "lint"):
        assert lists(checkout, target) == {"requirements.txt"}
    stamp(checkout, "ready")
    assert lists(checkout, "test") == set()


def test_a_cuda_environment_serves_all_and_is_brought_up_to_date_from_its_own_list(checkout: Path) -> None:
    assert lists(checkout, "cuda") == {"requirements-cuda.txt"}
    stamp(checkout, "cuda")
    for target in ("cuda", "quickstart", "test"):
        assert lists(checkout, target) == set()
    os.utime(checkout / "requirements.txt", (time.time() + 60,) * 2)
    assert lists(checkout, "test") == set()
    os.utime(checkout / "requirements-cuda.txt", (time.time() + 60,) * 2)
    for target in ("cuda", "test"):
        assert lists(checkout, target) == {"requirements-cuda.txt"}


@pytest.mark.parametrize("state", ["ready", "half-installed"])
def test_cuda_is_not_installed_over_the_cpu_stack(checkout: Path, state: str) -> None:
    stamp(checkout, state)
    refused = run("make", "cuda", cwd=checkout)
    assert refused.returncode != 0
    assert refused.stderr.splitlines()[0] == "make cuda: .venv holds the CPU's stack; remove it first: rm -rf .venv"
    assert sorted(path.name for path in (checkout / ".venv").iterdir()) == [state]


def test_an_interrupted_cuda_installation_is_taken_up_again(checkout: Path) -> None:
    python = checkout / "python"
    python.write_text("#!/bin/sh\nmkdir -p .venv/bin\n")
    python.chmod(0o755)
    pip = checkout / ".venv/bin/pip"
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\nkill -TERM $PPID; sleep 1\n")
    pip.chmod(0o755)
    stamp(checkout, "cuda", age_s=1e9)
    assert run("make", "cuda", "PYTHON=./python", cwd=checkout).returncode != 0
    assert lists(checkout, "test") == {"requirements-cuda.txt"}


def test_another_python_is_refused(checkout: Path) -> None:
    python = checkout / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 13, 0); exec(sys.argv[1])" "$2"\n')
    python.chmod(0o755)
    refused = run("make", "cuda", "PYTHON=./python", cwd=checkout)
    assert refused.returncode != 0
    assert "Python 3.11 or 3.12: make PYTHON=/path/to/python3.11" in refused.stderr


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return tmp_path / "venv"


def nvcc(venv: Path) -> None:
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "nvidia/cu13/bin").mkdir(parents=True)
    (packages / "nvidia/cu13/bin/nvcc").symlink_to("/bin/true")


@pytest.mark.parametrize(
    ("compiler", "with_nvcc", "reason"),
    [
        ("/nonexistent/c++", True, r"no C\+\+ compiler: install g\+\+"),
        ("/bin/true", False, "no nvcc in .*/nvidia/cu13: install requirements-cuda.txt"),
        ("/bin/true", True, "the build failed, and the end of .* says why"),
    ],
)
def test_what_cannot_be_built_is_a_line_and_an_error_only_where_it_is_required(
    venv: Path, compiler: str, with_nvcc: bool, reason: str
) -> None:
    if with_nvcc:
        nvcc(venv)
    script = str(ROOT / "tools/cuda_kernels.sh")
    skipped = run(script, str(venv), cwd=venv, CXX=compiler)
    assert skipped.returncode == 0, skipped.stderr
    lines = [line for line in skipped.stdout.splitlines() if "skipped" in line]
    assert [re.sub(r" is skipped: .*", "", line) for line in lines] == [
        "cuda_kernels: Transformer Engine 2.11.0",
        "cuda_kernels: apex 6424da3b",
    ]
    assert all(re.search(f"is skipped: {reason}$", line) for line in lines), lines
    required = run(script, str(venv), "--required", cwd=venv, CXX=compiler)
    assert required.returncode == 1 and required.stdout.splitlines()[-1] == lines[0]


def test_the_linker_finds_what_packages_have_under_the_names_of_versions(venv: Path) -> None:
    nvcc(venv)
    library = next(venv.glob("lib/python*/site-packages")) / "nvidia/cu13/lib/libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    run(str(ROOT / "tools/cuda_kernels.sh"), str(venv), cwd=venv, CXX="/nonexistent/c++")
    assert (venv / "build-libraries/libcudart.so").resolve() == library.resolve()


def instructions(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_the_dockerfile_has_known_instructions_and_a_pinned_base_with_a_compiler() -> None:
    assert {name for name, _ in INSTRUCTIONS} <= {"FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert INSTRUCTIONS[0][0] == "FROM" and re.fullmatch(r"nvidia/cuda:13\.0\.\d+-devel-ubuntu24\.04", INSTRUCTIONS[0][1])


def test_what_the_dockerfile_runs_is_shell() -> None:
    assert all(bash_accepts(script) for script in instructions("RUN"))
    assert not bash_accepts("if true; fi"), "the check sees nothing"


def test_what_the_dockerfile_copies_is_there_and_reaches_the_builder() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for words in map(shlex.split, instructions("COPY")):
        for source in words[:-1]:
            assert source in kept, f"{source} is ignored by .dockerignore"
            assert (ROOT / source).exists(), source


def test_the_dockerfile_installs_what_the_makefile_does() -> None:
    scripts = " ".join(instructions("RUN"))
    assert "--no-deps --requirement requirements-cuda.txt" in scripts
    assert "tools/cuda_kernels.sh /opt/venv --required" in scripts


def test_in_a_container_jobs_run_the_code_of_the_checkout(tmp_path: Path) -> None:
    script = 'source slurm/common.sh; echo "$PYTHONPATH"; echo "${STEP[@]}"'
    place = {"SLURM_JOB_ID": "1", "MEGAFORK_LOGS": str(tmp_path), "MEGAFORK_IMAGE": "image.sqsh", "PYTHONPATH": "/of/mine"}
    paths, step = run("bash", "-c", script, cwd=ROOT, **place).stdout.splitlines()
    assert paths == f"{ROOT}:/of/mine" and "--container-image=image.sqsh" in step


def test_commands_of_the_page_are_shell_and_name_files_that_exist() -> None:
    page = (ROOT / "docs/install.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        assert bash_accepts(block.replace("<this repository>", "URL")), block
    for file in re.findall(r"\b(?:recipes|slurm|tools)/[\w/]+\.\w+", page):
        assert (ROOT / file).exists() or file == "slurm/site.sh", file
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z][a-z-]*)", " ".join(blocks))) <= set(targets) | {"g"}
