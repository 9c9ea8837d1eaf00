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
UPDATES = 5


def _refit_after_updates(specs: list[Recipe], checked: tuple[int, ...], port: int) -> list[Any]:
    """After each update in `checked`, for other recipes than the first after the last of them: what the engine that was refitted says, and
    what a fresh one says."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.rollout.colocated import ColocatedEngine

    requests = [Request(prompt, 1) for prompt in PROMPTS]
    answers = []
    for number, spec in enumerate(specs):
        rig = Rig(spec)
        bridge = Bridge(rig.learner.chunks, rig.shape, rig.mesh, spec.rollout.tp)
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
}
EXPERTS = {"EP2": (2, {"ep": 2})}
MODELS = (((True, "fp32"), (False, "bf16")), ((True, "bf16"), (False, "fp32")))
"""Tied or not, and the dtype, two at a time: each layout of two ranks meets all four; of four ranks, whose engines start slowly, a tied
one of each dtype."""


@pytest.mark.parametrize("engine_tp", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refitted_engine_is_a_fresh_engine(layout: str, engine_tp: int, tmp_path: Path) -> None:
    world, parallel = LAYOUTS[layout]
    specs = [
        spec_of(tmp_path, "Qwen3", tied, dtype, parallel, engine_tp)
        for tied, dtype in MODELS[(list(LAYOUTS).index(layout) + engine_tp) % 2][: 4 // world]
    ]
    checked = tuple(range(1, UPDATES + 1)) if layout == "TP2" and engine_tp == 1 else (UPDATES,)
    compare(world, specs, checked)


OTHERS = {("TP2", 1): ["Phi3", "Qwen2"], ("PP2", 2): ["Phi3", "Mistral", "Llama"], ("EP2", 2): ["Qwen3Moe"]}
"""Families besides Qwen3, each in one layout; the one whose files fuse tensors in two."""


@pytest.mark.parametrize(("layout", "engine_tp"), OTHERS)
def test_every_family_is_refitted(layout: str, engine_tp: int, tmp_path: Path) -> None:
    assert {"Qwen3", *itertools.chain(*OTHERS.values())} == {name.removesuffix("ForCausalLM") for name in FAMILIES}
    world, parallel = {**LAYOUTS, **EXPERTS}[layout]
    others = OTHERS[layout, engine_tp]
    specs = [spec_of(tmp_path, other, False, "fp32", parallel, engine_tp, seed=seed) for seed, other in enumerate(others)]
    compare(world, specs, (UPDATES,))


def spec_of(folder: Path, architecture: str, tied: bool, dtype: str, parallel: dict[str, Any], engine_tp: int, seed: int = 0) -> Recipe:
    name = f"{architecture}-{'tied' if tied else 'untied'}-{dtype}"
    return recipe(
        save_model(folder / name, architecture, seed=seed, tie_word_embeddings=tied, hidden_size=128),
        run={"name": name},
        parallel=parallel,
        precision={"dtype": dtype},
        rollout={"tp": engine_tp, "max_response_length": 32, "kv_cache_mb": 16},
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
