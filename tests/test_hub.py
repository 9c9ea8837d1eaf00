"""Models by hub name: the hub's cache is used, and without it one line says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megafork.data.hub import is_hub_name, local_model

CALL = "import sys; from megafork.data.hub import local_model; print(local_model(sys.argv[1]))"


SERVER = """
import sys
from megafork.recipe import Data, Model, Recipe
from megafork.rollout.serve import configuration
print(configuration(Recipe(model=Model(path=sys.argv[1]), data=Data(train="rows.jsonl"))).model)
"""


def resolve(name: str, cache: Path, call: str = CALL) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment at import."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", call, name], env=environment, cwd=cache, capture_output=True, text=True)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """The folder of acme/tiny in a cache of the hub."""
    model = tmp_path / "models--acme--tiny"
    snapshot = model / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0123")
    return snapshot


def test_a_cached_model_is_found_without_a_network(snapshot: Path, tmp_path: Path) -> None:
    assert resolve("acme/tiny", tmp_path).stdout.strip() == str(snapshot)


@pytest.mark.slow
def test_a_server_reads_the_same_folder_as_its_trainer(snapshot: Path, tmp_path: Path) -> None:
    """FP8 needs the config, to name the layers that stay in bf16."""
    found = resolve("acme/tiny", tmp_path, SERVER)
    assert found.stdout.strip() == str(snapshot), found.stderr


def test_a_model_that_the_hub_does_not_give(tmp_path: Path) -> None:
    answer = resolve("acme/none", tmp_path)
    assert "RecipeError: model.path is 'acme/none': no such folder, and the hub did not provide it" in answer.stderr
    assert answer.stderr.strip().splitlines()[-1].endswith("`hf download acme/none`")


def test_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    for name in ("models/mine", "models/absent", "/models/absent", "./absent", "absent", "~no such user/absent"):
        assert local_model(name) == name
    monkeypatch.setenv("HOME", "/home/me")
    assert local_model("~/absent") == "/home/me/absent"
    assert is_hub_name("Qwen/Qwen3-8B") and not is_hub_name("models/absent")
