"""Entropies and log-probs from real vLLM engines against transformers: preempted, in chunks, from a cache, several tokens at a time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, on_ranks
from tiny import FolderWeights, recipe, save_model

from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling, request_seed

pytestmark = pytest.mark.slow

PROMPTS = [[(7 * i + n * i * i) % 99 for i in range(length)] for n, length in enumerate((100, 126, 3, 150, 126))]
REQUESTS = [Request(prompt, request_seed(3, n, sample)) for n, prompt in enumerate(PROMPTS) for sample in range(3)]
SAMPLING = Sampling(max_tokens=40, temperature=0.25, stop=(7,), entropies=True)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ENGINES: dict[str, dict[str, Any]] = {
    "a cache for four blocks": {},
    "prompts in chunks": {"max_num_batched_tokens": 48, "enable_prefix_caching": True},
    "speculation": {"speculative_config": NGRAM},
}


def _generate(spec: Recipe, folder: Path, port: int) -> list[tuple[list[Completion], int, int]]:
    """Of each engine: the completions, how often a request was preempted, and how many tokens of drafts were accepted."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    from vllm.v1.core.sched.scheduler import Scheduler

    from megafork.rollout.colocated import ColocatedEngine

    counts = {"preempted": 0, "accepted": 0}
    preempt, update = Scheduler._preempt_request, Scheduler.update_from_output

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        counts["preempted"] += 1
        preempt(self, *args, **kwargs)

    def watched(self: Any, scheduled: Any, output: Any) -> Any:
        counts["accepted"] += sum(max(len(tokens) - 1, 0) for tokens in output.sampled_token_ids)
        return update(self, scheduled, output)

    Scheduler._preempt_request, Scheduler.update_from_output = counted, watched
    results = []
    for engine_arguments in ENGINES.values():
        counts |= {"preempted": 0, "accepted": 0}
        engine = ColocatedEngine(replace(EngineConfig.of(spec), engine=engine_arguments), mesh, FolderWeights(folder))
        engine.refit(0)
        answers = engine.generate(REQUESTS, SAMPLING)
        counted_so_far = counts["preempted"], counts["accepted"]
        plain = engine.generate(REQUESTS[4:6], replace(SAMPLING, entropies=False))
        assert not plain[0].entropies and len(plain[0].log_probs) == len(plain[0].tokens)
        if "speculative_config" not in engine_arguments:  # what is drawn then depends on how far drafts reach
            assert [c.tokens for c in plain] == [c.tokens for c in answers[4:6]]
            for one, other in zip(plain, answers[4:6], strict=True):
                assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        results.append((answers, *counted_so_far))
        engine.close()
    return results


def test_each_token_has_its_entropy_and_log_prob(tmp_path: Path) -> None:
    """On both ranks of an engine of TP 2."""
    import transformers

    folder = save_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = recipe(
        folder,
        data={"max_prompt_length": 150},
        rollout={"tp": 2, "max_response_length": 40, "kv_cache_mb": 1, "max_running": 8},
        parallel={"tp": 2},
        forks={"entropy_from": "rollout"},
    )
    ranks = on_ranks(2, _generate, spec, folder, free_port(), engines=True)
    assert all(rank == ranks[0] for rank in ranks)
    for (answers, preempted, accepted), what in zip(ranks[0], ENGINES, strict=True):
        assert preempted, "choose a smaller cache"
        assert (accepted > 20) == (what == "speculation")
        for request, completion in zip(REQUESTS, answers, strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*request.prompt, *completion.tokens]])
                logits = model(ids).logits[0, len(request.prompt) - 1 : -1].double() / SAMPLING.temperature
            log_prob = logits.log_softmax(-1)
            entropy = -(log_prob.exp() * log_prob).sum(-1)
            drawn = log_prob.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.entropies).double(), entropy, atol=1e-4, rtol=0)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), drawn, atol=1e-4, rtol=0)
            assert completion.truncated == (completion.tokens[-1] != 7) and 7 not in completion.tokens[:-1]
