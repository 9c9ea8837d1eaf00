"""Routing replay: updates with given experts against float64 transformers, the experts that real engines report, and whole steps."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import routed
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import free_port, on_ranks
from reference import reference
from task import make_task, write_recipe
from test_experts import save
from test_rollout_entropy import NGRAM, PROMPTS, train
from tiny import FolderWeights, recipe
from training import Rig, compare, responses, specs, train_on_rank

from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.train.inputs import read_inputs
from megafork.train.redistribute import RoutingSize

pytestmark = pytest.mark.slow
REPLAY = {"rollout": {"routing": "replay"}}
SERVERS = {"rollout": {"routing": "replay", "servers": ["http://localhost:1"]}}
"""Servers do not report experts, so those of the scoring pass are replayed. These are not asked for anything."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2 TP2": (2, {"parallel": {"ep": 2, "tp": 2, "sp": True}}),
    "EP2 PP2": (4, {"parallel": {"ep": 2, "pp": 2}, "model": {"recompute": "full"}}),
    "EP2 CP2": (2, {"parallel": {"ep": 2, "cp": 2}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), "MoE", num_hidden_layers=2)


@pytest.fixture(scope="module", params=[REPLAY, SERVERS], ids=["rollout", "score"])
def wanted(request: pytest.FixtureRequest, folder: Path) -> tuple[dict[str, Any], Any, Any]:
    """Where the routing comes from, what the reference makes of it, and what one rank does."""
    source = request.param
    [plain] = on_ranks(1, train_on_rank, specs(folder, source))
    return source, [reference(spec) for spec in specs(folder, source)], plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_steps_with_given_experts_equal_the_float64_reference(layout: str, folder: Path, wanted: Any) -> None:
    """Random experts, which no router would choose; or, from the scoring pass, those of the step's first weights in both mini-batches."""
    source, expected, plain = wanted
    world, sections = LAYOUTS[layout]
    compare(on_ranks(world, train_on_rank, specs(folder, {**sections, **source})), expected, plain)
    replaced = [step["experts/replaced"] for step in plain[1]["history"]]
    if source is REPLAY:
        assert min(replaced) > 0.3, "two of four experts by chance"
    else:
        assert 0 < max(replaced) < 0.3, "the second mini-batch's own choice, after the first update"


def test_layers_without_experts(tmp_path: Path) -> None:
    mixed = save(tmp_path, "MoE, some layers dense")
    spec = specs(mixed, {"parallel": {"ep": 2, "pp": 2}, **REPLAY})[:1]
    compare(on_ranks(4, train_on_rank, spec), [reference(spec[0])])


def _neighbour_instead() -> None:
    """The experts of a token go to the token after it."""
    from megafork.model.experts import Router

    right = Router._mine
    Router._mine = lambda self, tokens: right(self, tokens.roll(1, 0) if tokens.dim() > 1 else tokens)  # type: ignore[method-assign]


def _weights_of_own_choice() -> None:
    """The given experts get the scores of those that the router would have chosen."""
    from megafork.model.experts import Replay

    right = Replay.get_replay_topk

    def planted(self: Any, scores: Any, topk: int, *how: Any) -> Any:
        return scores.topk(topk, 1).values, right(self, scores, topk, *how)[1]

    Replay.get_replay_topk = planted  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("plant", [_neighbour_instead, _weights_of_own_choice], ids=["choice of another token", "weights"])
def test_a_planted_bug_is_found(plant: Callable[[], None], folder: Path) -> None:
    spec = specs(folder, REPLAY)[:1]
    results = on_ranks(1, train_on_rank, spec, plant)
    with pytest.raises(AssertionError):
        compare(results, [reference(spec[0])])


def _with_own_choice(spec: Recipe) -> Any:
    """A step as it is, and one whose routing is what the routers would choose anyway."""
    import transformers

    steps = []
    for routing in ("none", "replay"):
        rig = Rig(spec.model_copy(update={"rollout": spec.rollout.model_copy(update={"routing": routing})}))
        model = transformers.AutoModelForCausalLM.from_pretrained(spec.model.path, dtype=torch.float32)
        routing_of = {(r.group, r.sample): routed.chosen(model, r).flip(-1) for r in responses()}
        if routing == "replay":
            rig.every = [replace(r, routing=routing_of[r.group, r.sample]) for r in responses()]
        steps.append((rig.step(0), rig.weights()))
    return steps


def test_replay_at_equal_weights_changes_nothing(folder: Path) -> None:
    """To the last bit, in whichever order the engine names the experts. The first update is too small to change any weight."""
    spec = specs(folder, {"optimizer": {"lr": 1e-30}})[0]
    [[(one, weights), (other, same)]] = on_ranks(1, _with_own_choice, spec)
    assert other[0].pop("experts/replaced") == one[0].pop("experts/replaced") == 0.0
    assert one == other
    assert all(torch.equal(weights[name], same[name]) for name in weights)


# ---- what engines report

REQUESTS = [Request(prompt, 10 * n + sample) for n, prompt in enumerate(PROMPTS) for sample in range(3)]
ENGINES: dict[str, dict[str, Any]] = {
    "prompts in chunks and from a cache": {"max_num_batched_tokens": 48, "enable_prefix_caching": True},
    "speculation": {"speculative_config": NGRAM},
}


def _generate(spec: Recipe, port: int) -> list[list[Completion]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.rollout.colocated import ColocatedEngine

    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    answers = []
    for arguments in ENGINES.values():
        config = replace(EngineConfig.of(spec), engine=arguments, whole_experts="speculative_config" in arguments)
        engine = ColocatedEngine(config, mesh, FolderWeights(Path(spec.model.path)))
        engine.refit(0)
        answers.append(engine.generate(REQUESTS, Sampling(max_tokens=40, temperature=0.25, stop=(7,))))
        engine.close()
    return answers


def test_engines_report_the_experts_of_each_token(tmp_path: Path) -> None:
    """Engines of TP 2, against the choice and the log-probs of transformers; of the second each rank has half of the experts, whole."""
    import transformers

    folder = save(tmp_path, "MoE, some layers dense")
    spec = recipe(
        folder,
        rollout={"routing": "replay", "tp": 2, "max_response_length": 40, "kv_cache_mb": 1, "max_running": 8},
        data={"max_prompt_length": 150},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for completions in on_ranks(2, _generate, spec, free_port(), engines=True, timeout_s=400)[0]:
        for request, completion in zip(REQUESTS, completions, strict=True):
            prompt, tokens = (torch.tensor(part, dtype=torch.int32) for part in (request.prompt, completion.tokens))
            want = routed.chosen(model, replace(responses()[0], prompt_tokens=prompt, tokens=tokens))
            assert torch.equal(completion.routing.sort(-1).values, want.sort(-1).values)
            with torch.no_grad():
                logits = model(torch.cat([prompt, tokens]).long()[None]).logits[0, len(prompt) - 1 : -1] / 0.25
            log_probs = logits.log_softmax(-1).gather(-1, tokens.long()[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.log_probs), log_probs, atol=1e-4, rtol=0)


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 8), st.sampled_from([4, 128, 256, 257, 4096]), st.randoms())
@settings(max_examples=50, deadline=None)
def test_routing_survives_its_journey(tokens: int, layers: int, chosen: int, experts: int, random: Any) -> None:
    size = RoutingSize(layers, chosen, experts)
    routing = torch.tensor([random.randrange(experts) for _ in range(tokens * layers * chosen)], dtype=torch.int16).view(
        tokens, layers, chosen
    )
    data = size.encode(routing)
    assert len(data) == size.words(tokens) and torch.equal(size.decode(data, tokens), routing)


# ---- whole steps


def test_whole_steps_replay_the_engines_choice(tmp_path: Path) -> None:
    """In fp32 and with one update per step, engine and trainer choose alike, so replay changes nothing; in bf16 they do not always."""
    task = make_task(tmp_path, architecture="Qwen3Moe", tie_word_embeddings=False)
    (task / "verifier.py").write_text("def score(response, row):\n    return float(response[:1] < '5')\n")
    sections: dict[str, dict[str, Any]] = {
        "parallel": {"ep": 2},
        "rollout": {"prompts": 8, "samples": 8, "max_response_length": 24, "dynamic_sampling": False},
        "reward": {"verifier": f"{task}/verifier.py:score", "workers": 1},
        "train": {"minibatches": 1},
        "log": {"tensorboard": False, "rollouts_every": 1},
    }
    file = write_recipe(task, **sections)
    named = [
        (f"{dtype}-{routing}", [f"precision.dtype={dtype}", f"rollout.routing={routing}"])
        for dtype, routing in itertools.product(("fp32", "bf16"), ("none", "replay"))
    ]
    trained = on_ranks(
        2, train, [load_recipe(file, [*changes, f"run.name={name}"]) for name, changes in named], free_port(), engines=True, timeout_s=400
    )[0]
    plain, replayed, rough, corrected = (history for history, *_ in trained)
    numbers = ("loss/policy", "grad_norm", "forks/tau", "entropy/mean", "accuracy/mean", "rollout_mismatch/kl")
    for one, other in zip(plain, replayed, strict=True):
        assert {name: other[name] for name in numbers} == pytest.approx({name: one[name] for name in numbers}, rel=1e-4, abs=1e-6)
        assert other["experts/replaced"] < 1e-3
    for one, other in zip(rough, corrected, strict=True):
        assert other["experts/replaced"] > 0
        assert 0 < other["rollout_mismatch/kl"] < one["rollout_mismatch/kl"]


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    from tiny import save_model

    with pytest.raises(RecipeError, match=r"rollout\.routing is replay but the model is dense, it has no experts: leave it out"):
        read_inputs(recipe(save_model(tmp_path), rollout={"routing": "replay"}), supervised=False)


def test_a_replay_without_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.routing is replay with rollout\.servers and no scoring pass: .*old_log_prob=score"):
        recipe(tmp_path, **SERVERS, forks={"entropy_from": "rollout"}, loss={"old_log_prob": "rollout"})
