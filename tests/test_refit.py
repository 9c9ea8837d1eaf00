"""The bridge into real engines: after every update, vLLM answers like a fresh engine that loaded the exported folder."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port, on_ranks
from tiny import PROMPTS, recipe, save_model
from training import Rig

from megafork.recipe import Recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling
from megafork.shape import FAMILIES
from megafork.weights.huggingface import write_folder
from megafork.weights.refit import Bridge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
GREEDY = Sampling(max_tokens=8, temperature=0.0)
UPDATES = 3


def _refit_after_updates(specs: list[Recipe], checked: tuple[int, ...], port: int) -> list[Any]:
    """After each update in `checked`, for other recipes than the first after the last of them: what the engine that was refitted says, and
    what a fresh one says."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.rollout.colocated import ColocatedEngine

    requests = [Request(prompt, 1) for prompt in PROMPTS]
    answers = []
    for number, spec in enumerate(specs):
        rig = Rig(spec)
        bridge = Bridge(rig.learner.chunks, rig.shape, rig.mesh, spec.rollout.tp, whole_experts=spec.rollout.whole_experts)
        engine = ColocatedEngine(EngineConfig.of(spec), rig.mesh, bridge)
        for update in range(1, UPDATES + 1):
            rig.step(update)
            rig.learner.settle()
            engine.refit(update)
            said = engine.generate(requests, GREEDY)
            if update in (checked if number == 0 else checked[-1:]):
                answers.append((said, _fresh(spec, rig, update).generate(requests, GREEDY)))
        engine.close()
    return answers


def _fresh(spec: Recipe, rig: Rig, update: int) -> Any:
    from megafork.rollout.colocated import ColocatedEngine

    folder = Path(spec.model.path).parent / f"exported-{spec.run.name}-{update}"
    weights = rig.weights()
    if rig.mesh.is_rank_zero:
        write_folder(folder, weights.items(), like=Path(spec.model.path))
    import torch.distributed as dist

    dist.barrier()

    class FromFolder(ColocatedEngine):
        def _arguments(self, *arguments: Any) -> dict[str, Any]:
            return {**super()._arguments(*arguments), "load_format": "auto", "model": str(folder)}

    engine = FromFolder(EngineConfig.of(spec), rig.mesh, ())
    engine._llm.llm_engine.set_weight_version(str(update))
    return engine


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "DP2": (2, {}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "EP2": (2, {"ep": 2}),
    "EP2 TP2": (2, {"ep": 2, "tp": 2, "sp": True}),
}
CASES: dict[tuple[str, int], list[tuple[str, bool, str]]] = {
    ("TP2", 1): [("Qwen3", True, "fp32"), ("Phi3", False, "fp32"), ("Qwen2", False, "fp32")],
    ("TP2", 2): [("Qwen3", False, "bf16")],
    ("PP2", 1): [("Qwen3", True, "bf16")],
    ("PP2", 2): [("Phi3", False, "fp32"), ("Qwen3", False, "fp32")],
    ("DP2", 1): [("Qwen3", False, "bf16")],
    ("DP2", 2): [("Mistral", False, "fp32")],
    ("TP2 PP2", 1): [("Llama", False, "fp32")],
    ("TP2 PP2", 2): [("Qwen3", True, "bf16")],
    ("EP2", 1): [("Qwen3Moe", False, "fp32")],
    ("EP2 TP2", 2): [("Qwen3Moe", False, "bf16"), ("Qwen3Moe_whole", False, "fp32")],
}
"""Layout and the engines' TP: family, tied or not, dtype. Qwen3 comes tied and untied in both dtypes, every other family once, and those
whose tensors are split otherwise than others' (fused ones, experts) under both splits. Experts are also shared by an engine, each whole."""
EXPERTS = {1: 64, 2: 48}
"""Size of an expert by the engines' TP: whole multiples of 32, and halves that vLLM pads to one."""


def test_every_family_has_a_case() -> None:
    assert {family.partition("_")[0] for cases in CASES.values() for family, _, _ in cases} == {
        name.removesuffix("ForCausalLM") for name in FAMILIES
    }


@pytest.mark.parametrize(("layout", "engine_tp"), CASES)
def test_a_refitted_engine_is_a_fresh_engine(layout: str, engine_tp: int, tmp_path: Path) -> None:
    """Every tensor of a policy that was trained reaches its place in vLLM, and no old weight or cached prefix is left: bit-equal."""
    world, parallel = LAYOUTS[layout]
    specs = [spec_of(tmp_path, *case, parallel, engine_tp, seed) for seed, case in enumerate(CASES[layout, engine_tp])]
    compare(world, specs, checked=(1, UPDATES) if (layout, engine_tp) == ("TP2", 1) else (UPDATES,))


def spec_of(folder: Path, architecture: str, tied: bool, dtype: str, parallel: dict[str, Any], engine_tp: int, seed: int) -> Recipe:
    name = f"{architecture}-{'tied' if tied else 'untied'}-{dtype}"
    architecture, _, whole = architecture.partition("_")
    experts: dict[str, Any] = {"moe_intermediate_size": EXPERTS[engine_tp]} if architecture == "Qwen3Moe" else {}
    return recipe(
        save_model(folder / name, architecture, seed=seed, tie_word_embeddings=tied, hidden_size=128, **experts),
        run={"name": name},
        parallel=parallel,
        precision={"dtype": dtype},
        rollout={"tp": engine_tp, "max_response_length": 32, "kv_cache_mb": 16, "whole_experts": bool(whole)},
        train={"micro_batch_tokens": 64},
        optimizer={"lr": 1e-2, "eps": 1e-2},
    )


def compare(world: int, specs: list[Recipe], checked: tuple[int, ...]) -> None:
    for answers in on_ranks(world, _refit_after_updates, specs, checked, free_port(), timeout_s=500, engines=True):
        assert len(answers) == len(checked) + len(specs) - 1
        said: list[list[Completion]] = [refitted for refitted, _ in answers]
        for refitted, fresh in answers:
            assert [c.tokens for c in refitted] == [c.tokens for c in fresh]
            assert [c.log_probs for c in refitted] == [c.log_probs for c in fresh]
        assert all([c.log_probs for c in one] != [c.log_probs for c in other] for one, other in itertools.pairwise(said))
