"""Real vLLM engines in the ranks: exact after a refit, repeatable, and in agreement with Megatron about log-probs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, on_ranks
from tiny import PROMPTS, FolderWeights, recipe, save_model

from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe, RecipeError
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling, request_seed

pytestmark = pytest.mark.slow


def _generate(spec: Recipe, folders: list[Path], port: int) -> list[list[Completion]]:
    """Refit one engine to each folder in turn and sample from each."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    from megafork.rollout.colocated import ColocatedEngine

    weights = FolderWeights(folders[0])
    engine = ColocatedEngine(EngineConfig.of(spec), mesh, weights)
    requests = [Request(prompt, request_seed(1, n, s)) for n, prompt in enumerate(PROMPTS) for s in range(2)]
    answers = []
    for version, weights.folder in enumerate(folders):
        if version:
            engine.sleep()
            engine.wake("weights")
        engine.refit(version)
        if version:
            assert engine._llm.llm_engine.is_sleeping(), "vLLM draws nothing without its KV cache"
            engine.wake("kv_cache")
        assert not engine._llm.llm_engine.is_sleeping()
        ended: dict[int, Completion] = {}
        answers.append(engine.generate(requests, Sampling(max_tokens=12, temperature=0.8, stop=(7,)), ended.__setitem__))
        assert ended == dict(enumerate(answers[-1])), "each is told of as it ends"
    engine.close()
    return answers


def _start(spec: Recipe, folder: Path, port: int) -> str:
    """Why an engine of the recipe does not start."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    from megafork.rollout.colocated import ColocatedEngine

    with pytest.raises(RecipeError) as caught:
        ColocatedEngine(EngineConfig.of(spec), mesh, FolderWeights(folder))
    return str(caught.value)


def test_a_kv_cache_for_less_than_one_response(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", max_position_embeddings=2048)
    spec = recipe(folder, rollout={"kv_cache_mb": 1, "max_response_length": 2000})
    said = on_ranks(1, _start, spec, folder, free_port(), engines=True)[0]
    assert said.startswith(
        f"the KV cache holds no response of {spec.longest_sequence:,} tokens, prompt included: raise rollout.kv_cache_mb"
    )


def _reference_log_probs(folder: Path, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        logp = (model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize(("tied", "tp"), [(True, 1), (False, 1), (True, 2), (False, 2)])
def test_refit_equals_the_new_weights_and_not_the_old(tied: bool, tp: int, tmp_path: Path) -> None:
    folders = [save_model(tmp_path / str(seed), seed=seed, tie_word_embeddings=tied) for seed in (1, 2)]
    seed = {"seed": 2**63 - 1}  # numpy's, which vLLM seeds as well, have half the bits
    spec = recipe(folders[0], run=seed, rollout={"tp": tp, "max_response_length": 32}, parallel={"tp": 2})
    ranks: list[Any] = on_ranks(2, _generate, spec, [folders[0], folders[1], folders[0]], free_port(), engines=True)
    first, second, again = ranks[0]
    assert [c.tokens for c in first] == [c.tokens for c in again]
    assert [c.log_probs for c in first] == [c.log_probs for c in again]
    assert [c.tokens for c in first] != [c.tokens for c in second]
    assert ranks[0] == ranks[1], "both ranks (one engine of TP 2, or two of TP 1 with the same seeds) say the same"
    assert all(set(c.versions) == {0} for c in first) and all(set(c.versions) == {2} for c in again)
    for folder, completions in zip(folders, (first, second), strict=True):
        for n, completion in enumerate(completions):
            want = _reference_log_probs(folder, PROMPTS[n // 2], completion.tokens, 0.8)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), want, atol=1e-4, rtol=0)
            assert completion.truncated == (completion.tokens[-1] != 7) and (len(completion.tokens) == 12 or not completion.truncated)
            assert 7 not in completion.tokens[:-1]
