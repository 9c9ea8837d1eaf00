"""Fork-aware decoding: the rule against float64, vLLM's two interfaces with vLLM's own objects, and real engines against transformers."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import free_port, on_ranks
from tiny import PROMPTS, FolderWeights, recipe, save_model

from megafork.compat import vllm as vllm_fixes
from megafork.recipe import Recipe, RecipeError
from megafork.rl.fork_temperature import PAPER_GRID, ForkTemperature, scale_logits, sweep, token_entropy
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling, request_seed

vllm_fixes.prepare()


def _entropy(logits: np.ndarray) -> float:
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=40), st.booleans())
def test_entropy_is_that_of_float64(values: list[float], masked: bool) -> None:
    logits = torch.tensor([[*values, -math.inf] if masked else values])
    assert token_entropy(logits).item() == pytest.approx(_entropy(logits[0].double().numpy()), abs=2e-5)


def test_entropy_at_its_ends() -> None:
    certain = torch.full((1, 1000), -math.inf)
    certain[0, 7] = 3.0
    assert token_entropy(certain).item() == 0.0
    assert token_entropy(torch.full((1, 1000), 5.0)).item() == pytest.approx(math.log(1000), abs=1e-5)


def test_each_row_gets_the_temperature_of_its_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 50) * torch.linspace(0.1, 8, 64)[:, None]
    settings = torch.tensor([[0.3, 2.0, 1.5], [0.0, 1.0, 1.5], [1.0, 0.0, 2.0], [1.0, 1.0, 0.5]]).repeat(16, 1)
    scaled = scale_logits(logits.clone(), settings)
    assert torch.equal(scaled, scale_logits(logits.clone(), settings, at_once=150)), "by three rows at a time"
    kinds = set()
    for before, (low, high, threshold), after in zip(logits.double().numpy(), settings.tolist(), scaled.numpy(), strict=True):
        hot = _entropy(before) > threshold
        temperature = high if hot else low
        kinds.add((low, high, hot))
        if temperature == 0:
            assert np.flatnonzero(np.isfinite(after)).tolist() == [before.argmax()]
        else:
            np.testing.assert_allclose(after, before / np.float32(temperature), rtol=1e-6)
    assert len(kinds) == 8, "each of the four settings met entropies on both sides"


def test_ones_change_nothing_and_equal_temperatures_are_a_plain_one() -> None:
    logits = torch.randn(8, 30)
    assert torch.equal(scale_logits(logits.clone(), torch.tensor([[1.0, 1.0, 0.0]]).repeat(8, 1)), logits)
    assert torch.equal(scale_logits(logits.clone(), torch.tensor([[0.7, 0.7, 2.0]]).repeat(8, 1)), logits / torch.tensor(0.7))


def test_of_equal_logits_greedy_takes_the_first() -> None:
    scaled = scale_logits(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert scaled.tolist() == [[-math.inf, 2.0, -math.inf]]


def test_the_sweep_is_the_papers_grid() -> None:
    pairs = [(forks.low, forks.high) for forks in sweep()]
    assert len(pairs) == len(set(pairs)) == 15
    assert set(pairs) == {(t, 1.0) for t in PAPER_GRID} | {(1.0, t) for t in PAPER_GRID}
    assert {forks.threshold for forks in sweep(0.5)} == {0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 1.0, 0.5), "fork temperature: low is -1.0: must be 0 (greedy at these tokens), or between 0.01 and 100"),
        ((1.0, 0.001, 0.5), "fork temperature: high is 0.001: must be 0"),
        ((1.0, math.nan, 0.5), "fork temperature: high is nan"),
        ((1.0, 1.0, -0.1), "fork temperature: threshold is -0.1: an entropy in nats is at least 0"),
    ],
)
def test_wrong_temperatures(values: tuple[float, float, float], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        ForkTemperature(*values)
    assert str(caught.value).startswith(message)


def _params(forks: ForkTemperature | None = None, **changes: Any) -> Any:
    import vllm

    return vllm.SamplingParams(extra_args=None if forks is None else forks.arguments, **changes)


@pytest.mark.slow
def test_a_request_that_asks_wrongly_is_refused_at_the_door() -> None:
    import vllm

    from megafork.rollout.logits_processor import ForkProcessor

    ForkProcessor.validate_params(_params(ForkTemperature(0.0, 1.0)))
    ForkProcessor.validate_params(_params(temperature=0.3))
    for wrong, message in (
        (_params(ForkTemperature(0.0, 1.0), temperature=0.3), "temperature is 0.3 beside fork_temperature"),
        (vllm.SamplingParams(extra_args={"fork_temperature": 0.3}), r"fork_temperature is 0.3: must be \[low, high, threshold\]"),
        (vllm.SamplingParams(extra_args={"fork_temperature": [0.3, -1, 0]}), "high is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ForkProcessor.validate_params(wrong)


HOT, COLD = ForkTemperature(2.0, 2.0, 1.0), ForkTemperature(0.5, 0.5, 1.0)


def _factors(processor: Any, rows: int, *ctx: Any) -> list[float]:
    """By what each row of ones was divided."""
    return [1 / value for value in processor.apply(torch.ones(rows, 5), *ctx)[:, 0].tolist()]


@pytest.mark.slow
def test_runner_v1_moves_requests_about_in_the_batch() -> None:
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    from megafork.rollout.logits_processor import ForkProcessor

    processor = ForkProcessor(None, torch.device("cpu"), False)
    plain = _params()

    def update(size: int, **changes: Any) -> None:
        processor.update_state(BatchUpdate(**{"batch_size": size, "removed": [], "added": [], "moved": [], **changes}))

    assert _factors(processor, 2) == [1, 1]
    update(3, added=[(0, _params(HOT), [], []), (1, plain, [], []), (2, _params(COLD), [], [])])
    assert _factors(processor, 3) == [2, 1, 0.5]
    processor.update_state(None)
    assert _factors(processor, 3) == [2, 1, 0.5]
    update(3, moved=[(0, 1, MoveDirectionality.SWAP)])
    assert _factors(processor, 3) == [1, 2, 0.5]
    update(2, removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)])
    assert _factors(processor, 2) == [1, 0.5]
    update(2, added=[(1, plain, [], [])])
    assert _factors(processor, 2) == [1, 1], "its place was taken by a request that asks for nothing"


@pytest.mark.slow
def test_runner_v2_keeps_requests_in_slots() -> None:
    """That runner needs a GPU; its interface does not."""
    interface = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface")
    from megafork.rollout.logits_processor import ForkProcessor

    buffers: Any = dict.fromkeys(("all_token_ids", "prompt_len", "prefill_len", "total_len"))
    state = interface.LogitsProcRequestState(device=torch.device("cpu"), max_num_reqs=4, vocab_size=5, **buffers)
    processor = ForkProcessor(None, state)

    def context(*slots: int) -> Any:
        rows = torch.tensor(slots)
        return interface.LogitsContext(rows, rows, np.array(slots), rows * 0, rows, rows, np.array(slots))

    assert [processor.add_request(slot, _params(forks)) for slot, forks in ((3, HOT), (1, COLD), (0, None))] == [True, True, False]
    processor.apply_staged_writes()
    assert _factors(processor, 3, context(0, 1, 3)) == [1, 0.5, 2]
    assert _factors(processor, 2, context(3, 1)) == [2, 0.5], "rows come in another order at each step"
    assert not processor.add_request(3, _params())
    processor.apply_staged_writes()
    assert _factors(processor, 2, context(3, 1)) == [1, 0.5], "the slot's former owner left nothing"
    assert _factors(processor, 2, context(3, 0)) == [1, 1]


def _decode(spec: Recipe, folder: Path, samplings: list[Sampling], port: int) -> list[list[Completion]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.parallel.mesh import build_mesh
    from megafork.rollout.colocated import ColocatedEngine

    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    engine = ColocatedEngine(replace(EngineConfig.of(spec), fork_decoding=True), mesh, FolderWeights(folder))
    engine.refit(0)
    requests = [Request(prompt, request_seed(1, n, s)) for n, prompt in enumerate(PROMPTS) for s in range(3)]
    answers = [engine.generate(requests, sampling) for sampling in samplings]
    with_an_interruption = engine.stream(requests, samplings[0])
    place, completion = next(with_an_interruption)
    with_an_interruption.close()
    assert completion == answers[0][place]
    assert engine.generate(requests[:2], samplings[1]) == answers[1][:2], "what was dropped does not come back"
    engine.close()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_engines_decode_as_transformers_says(tp: int, tmp_path: Path) -> None:
    import transformers

    folder = save_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(prompt: list[int], tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()

    threshold = round(float(token_entropy(logits(PROMPTS[2], list(range(40)))).median()), 3)
    settings = {(low, high): ForkTemperature(low, high, threshold) for low, high in ((0.4, 1.7), (0.0, 1.5), (0.7, 0.0), (0.8, 0.8))}
    samplings = [Sampling(24, stop=(7,), forks=forks) for forks in settings.values()]
    samplings += [Sampling(24, temperature=0.8, stop=(7,))]
    spec = recipe(folder, rollout={"tp": tp, "max_response_length": 32, "max_running": 5}, parallel={"tp": 2})
    ranks = on_ranks(2, _decode, spec, folder, samplings, free_port(), engines=True)
    assert ranks[0] == ranks[1], "both ranks (one engine of TP 2, or two of TP 1 with the same seeds) say the same"
    *with_forks, plain = ranks[0]
    assert with_forks[-1] == plain, "two equal temperatures are that temperature"
    for (low, high), completions in zip(settings, with_forks, strict=True):
        sides = set()
        for n, completion in enumerate(completions):
            z = logits(PROMPTS[n // 3], completion.tokens)
            entropy = token_entropy(z)
            assert (entropy - threshold).abs().min() > 1e-5, "choose another seed: rounding would decide"
            for row, hot, token, log_prob in zip(z, entropy > threshold, completion.tokens, completion.log_probs, strict=True):
                sides.add(bool(hot))
                temperature = high if hot else low
                if temperature == 0:
                    assert (token, log_prob) == (row.argmax().item(), 0.0)
                else:
                    assert log_prob == pytest.approx((row / temperature).log_softmax(-1)[token].item(), abs=1e-4)
        assert sides == {True, False}
