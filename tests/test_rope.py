"""Scaled rotary positions: updates and logits match transformers' under every kind of layout, log-probs match vLLM's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, on_ranks
from reference import reference
from tiny import recipe, save_model
from training import compare, specs, train_on_rank

from megafork.convert.convert import hf_to_megatron
from megafork.convert.named import find_model
from megafork.convert.verify import _megatron_logits, _transformers_logits
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe, RecipeError
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling, request_seed
from megafork.rollout.sample import response_limit
from megafork.shape import read_shape
from megafork.train.inputs import _check_rollout

ROPES: dict[str, dict[str, Any]] = {
    "YaRN": {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 16},
    "YaRN, every key": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 4,
        "beta_slow": 0.5,
        "attention_factor": 1.7,
        "truncate": False,
    },
    "DeepSeek's YaRN": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 8, "mscale": 2.0, "mscale_all_dim": 0.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
        "original_max_position_embeddings": 64,
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 PP2 CP2": (8, {"parallel": {"tp": 2, "pp": 2, "cp": 2}}),
    "CP2 TP2 SP, recompute all": (4, {"parallel": {"cp": 2, "tp": 2, "sp": True}, "model": {"recompute": "full"}}),
    "CP2": (2, {"parallel": {"cp": 2}}),
    "CP2 recompute attention": (2, {"parallel": {"cp": 2}, "model": {"recompute": "selective"}}),
}
SLOWLY = {"optimizer": {"lr": 1e-3}}
"""With attention this sharp, larger steps blow rounding up."""


def scaled(folder: Path, rope: str, architecture: str = "Qwen3", **changes: Any) -> Path:
    """Weights large enough that attention is sharp: positions then count."""
    sizes: dict[str, Any] = {} if architecture != "Qwen2" else {"head_dim": 32, "hidden_size": 128}
    save_model(folder, architecture, **sizes, rope_parameters={**ROPES[rope], "rope_theta": 1e4}, rope_theta=1e4, **changes)
    return folder


def without_scaling(folder: Path) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}))
    return folder


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A model and what the float64 reference makes of it, by its rope."""

    @cache
    def make(rope: str) -> tuple[Path, Any]:
        folder = scaled(tmp_path_factory.mktemp("model"), rope)
        return folder, [reference(spec) for spec in specs(folder, SLOWLY)]

    return make


@pytest.mark.parametrize(
    ("rope", "layout"),
    [
        *(pytest.param("YaRN", name, marks=pytest.mark.slow) for name in LAYOUTS if name != "CP2"),
        pytest.param("llama3", "TP2 PP2 CP2", marks=pytest.mark.slow),
        ("YaRN, every key", "CP2"),
    ],
)
def test_whole_steps_equal_the_float64_reference(rope: str, layout: str, wanted: Any) -> None:
    folder, expected = wanted(rope)
    world, sections = LAYOUTS[layout]
    compare(on_ranks(world, train_on_rank, specs(folder, {**sections, **SLOWLY})), expected)


def _differences(folders: list[Path], checkpoint: Path) -> list[float]:
    """Largest difference of the checkpoint's logits by Megatron from those of each folder by transformers."""
    shape = read_shape(checkpoint / "hf")
    tokens = torch.arange(3, 83)
    found = _megatron_logits(checkpoint, shape, tokens, torch.float32)
    return [float((_transformers_logits(folder, tokens, torch.float32) - found).abs().max()) for folder in folders]


@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen2", "Llama"])
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers(rope: str, architecture: str, tmp_path: Path) -> None:
    folder = scaled(tmp_path / "m", rope, architecture)
    hf_to_megatron(folder, tmp_path / "megatron")
    plain = without_scaling(Path(shutil.copytree(folder, tmp_path / "plain")))
    same, other = on_ranks(1, _differences, [folder, plain], tmp_path / "megatron")[0]
    assert same < 5e-5 < 0.1 < other


LONG = [3 + n % 90 for n in range(70)]


def _sampled(spec: Recipe, port: int) -> list[Completion]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    from megafork.rollout.colocated import ColocatedEngine

    engine = ColocatedEngine(EngineConfig.of(spec), mesh, find_model(spec.model.path).tensors())
    engine.refit(0)
    answers = engine.generate([Request(LONG[:n], request_seed(1, n, 0)) for n in (1, 20, 70)], Sampling(max_tokens=16, temperature=1.0))
    engine.close()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(("rope", "architecture"), [("YaRN", "Qwen2"), ("DeepSeek's YaRN", "Qwen3"), ("llama3", "Llama")])
def test_roll_outs_have_the_log_probs_of_transformers(rope: str, architecture: str, tmp_path: Path) -> None:
    """With YaRN also beyond what config.json calls max_position_embeddings, as the cards of Qwen2.5 and Qwen3 leave it."""
    import transformers

    folder = scaled(tmp_path / "m", rope, architecture, max_position_embeddings=128 if rope == "llama3" else 32)
    spec = recipe(folder, data={"max_prompt_length": 70}, rollout={"max_response_length": 16})
    [answers] = on_ranks(1, _sampled, spec, free_port(), engines=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for length, answer in zip((1, 20, 70), answers, strict=True):
        ids = torch.tensor([LONG[:length] + answer.tokens])
        with torch.no_grad():
            wanted = model(ids).logits[0, length - 1 : -1].double().log_softmax(-1)
        found = torch.tensor(answer.log_probs).double()
        torch.testing.assert_close(found, wanted.gather(-1, ids[0, length:, None])[:, 0], atol=1e-4, rtol=0)


def test_lengths_are_compared_with_the_positions_that_yarn_makes(tmp_path: Path) -> None:
    shape = read_shape(scaled(tmp_path / "m", "YaRN", max_position_embeddings=32))
    assert shape.max_positions == 96
    assert response_limit(None, shape, 10) == 86
    with pytest.raises(RecipeError, match="--max-tokens is 87 and the longest prompt has 10 tokens, but the model knows 96 positions"):
        response_limit(87, shape, 10)
    _check_rollout(shape, recipe(tmp_path / "m", data={"max_prompt_length": 40}, rollout={"max_response_length": 56}))
    with pytest.raises(RecipeError, match="is 97 but the model knows 96 positions"):
        _check_rollout(shape, recipe(tmp_path / "m", data={"max_prompt_length": 40}, rollout={"max_response_length": 57}))
