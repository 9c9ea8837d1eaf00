"""One import of torch and megatron for the whole test session; ranks are forked from it."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch
from hypothesis import settings

from megafork.data.verdicts import sandbox

torch.set_num_threads(1)

# A busy machine is not a failure, and neither is luck: `pytest --hypothesis-profile search` looks for new examples.
settings.register_profile("same everywhere", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("same everywhere")

LONGEST = (
    "test_slurm",
    "test_refit",
    "test_update",
    "test_rehearsal",
    "test_kills",
    "test_runs",
    "test_code_recipe",
    "test_ablation",
    "test_cli",
    "test_vllm_server",
    "test_launch",
)
"""Files that take minutes, which a worker does as a whole: they come first, so that no worker ends on one of them alone. Slurm's jobs and
the servers start most processes, so they come far apart."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(params=["bwrap", "unshare", "none"])
def tool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """What verifiers' sandboxes are made with: only this one is found, or none."""
    name: str = request.param
    folder = tmp_path_factory.mktemp("bin")
    for program in () if name == "none" else (name, "setpriv"):
        if (path := shutil.which(program)) is not None:
            (folder / program).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))
    if name != "none" and sandbox.available() is None:
        pytest.skip(f"{name} is not installed, or cannot make namespaces here")
    return name
