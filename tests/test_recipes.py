"""The recipes that people copy: each loads, fits the GPUs it names, builds its model, and matches the paper's arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from task import countdown
from torch.testing._internal.distributed.fake_pg import FakeStore

from megafork.model.build import PolicyConfig, build_policy
from megafork.model.precision import lacking
from megafork.parallel.mesh import build_mesh
from megafork.plan.hardware import gpu_named
from megafork.plan.models import shape_for
from megafork.plan.planner import Plan, gpus_for, make_plan
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
MODELS = ("qwen3_8b", "qwen3_14b", "qwen3_32b")
MIXTURES = ["qwen3_30b_a3b_fork.yaml", "qwen3_235b_a22b_fork.yaml"]
CLUSTER = [*(f"{model}_{kind}.yaml" for model in MODELS for kind in ("fork", "fork_fp8", "all_tokens")), *MIXTURES]
PRESETS = [f"presets/{name}.yaml" for name in ("default", "paper", "official_code")]
QUICKSTART = ["quickstart/sft.yaml", "quickstart/train.yaml", "quickstart_moe/sft.yaml", "quickstart_moe/train.yaml"]
WALK = ["walk/sft.yaml", "walk/train.yaml"]
CODE = ["code/sft.yaml", "code/train.yaml"]
ABLATION = [str(file.relative_to(RECIPES)) for file in sorted((RECIPES / "ablation").rglob("*.yaml"))]


def plan(name: str, gpus: int | None = None, overrides: list[str] | None = None) -> Plan:
    spec = load_recipe(RECIPES / name, overrides)
    return make_plan(shape_for(spec)[0], spec, gpus_for(spec, gpus), gpu_named("h100"))


def test_these_are_all_recipes_and_no_two_share_a_run_folder() -> None:
    runs = [*CLUSTER, *QUICKSTART, *WALK, *CODE, *ABLATION]
    assert {str(file.relative_to(RECIPES)) for file in RECIPES.rglob("*.yaml")} == {*runs, *PRESETS}
    assert len({load_recipe(RECIPES / name).run_folder for name in runs}) == len(runs)


@pytest.mark.parametrize("name", CLUSTER)
def test_it_fits_the_gpus_that_it_names_with_room_to_spare(name: str) -> None:
    said = re.search(
        r"H100: (\d+) GPUs or more, in multiples of (\d+)\.", (RECIPES / name.replace("all_tokens", "fork").replace("_fp8", "")).read_text()
    )
    assert said is not None
    least, multiple = map(int, said.groups())
    for gpus in (least, least + multiple, 128):
        planned = plan(name, gpus)
        assert planned.fits, planned.over
        assert max(planned.peaks.values()) < 0.95 * planned.gpu.memory
        assert planned.stages[0].engine.concurrent >= 8
        held = sum(kind.parameters * kind.every for stage in planned.stages for kind in stage.weights.kinds)
        assert 0 <= held - planned.parameters < 0.001 * held  # norms and routers are on every TP rank


@pytest.mark.parametrize("name", CLUSTER)
def test_it_does_the_papers_arithmetic(name: str) -> None:
    """Paper, 'Experimental setup': 512 prompts of 16 responses, 32 prompts an update, 2,048 + 20,480 tokens, lr 1e-6, clip 0.2 / 0.28."""
    planned = plan(name, 128)
    spec, step = planned.recipe, planned.step
    assert (spec.rollout.prompts, spec.rollout.samples, spec.rollout.prompts // spec.train.minibatches) == (512, 16, 32)
    assert (spec.data.max_prompt_length, spec.rollout.max_response_length, spec.reward.overlong_buffer) == (2048, 20480, 4096)
    assert (spec.optimizer.lr, spec.optimizer.warmup_steps, spec.optimizer.weight_decay) == (1e-6, 0, 0.1)
    assert (spec.loss.clip_low, spec.loss.clip_high, spec.rollout.temperature) == (0.2, 0.28, 1.0)
    assert spec.rollout.dynamic_sampling and spec.reward.overlong == "shaping" and spec.eval.samples == 16
    assert spec.data.template == (
        "User:\n{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    )
    assert spec.forks.top_entropy_quantile == 0.2 and spec.micro_batch_tokens == 2048 + 20480
    assert step.tokens == int(512 * 16 * (step.prompt + step.response))
    assert step.tokens <= step.micro_batches * spec.train.minibatches * planned.dp * spec.micro_batch_tokens < 2 * step.tokens


@pytest.mark.parametrize("model", MODELS)
def test_the_twin_differs_in_the_tokens_alone(model: str) -> None:
    fork, twin = (load_recipe(RECIPES / f"{model}_{kind}.yaml").model_dump() for kind in ("fork", "all_tokens"))
    assert fork["forks"].pop("select") == "top" and twin["forks"].pop("select") == "all"
    assert fork["run"].pop("name") != twin["run"].pop("name")
    assert fork == twin


def forks_of(name: str) -> dict[str, object]:
    """Settings of `forks` in which a recipe of the ablation differs from its folder's reference; it may differ in nothing else but its
    name."""
    file = RECIPES / name
    reference, other = (load_recipe(path).model_dump() for path in (file.with_name("top_20.yaml"), file))
    assert {section for section in other if other[section] != reference[section]} <= {"run", "forks"}
    assert {**other["run"], "name": ""} == {**reference["run"], "name": ""}
    return {key: value for key, value in other["forks"].items() if value != reference["forks"][key]}


def test_the_recipes_of_the_ablation_change_one_thing_each() -> None:
    for folder, task in (("ablation", "quickstart"), ("ablation/walk", "walk")):
        reference, trained = (load_recipe(RECIPES / file) for file in (f"{folder}/top_20.yaml", f"{task}/train.yaml"))
        assert reference.forks == trained.forks and reference.train == trained.train and reference.forks.top_entropy_quantile == 0.2
    weights = {"horvitz_thompson": True, "normalize_by": "response"}
    expected = {
        "top_20": {},
        "top_10": {"top_entropy_quantile": 0.1},
        "top_50": {"top_entropy_quantile": 0.5},
        "all": {"select": "all"},
        "bottom_80": {"select": "bottom", "top_entropy_quantile": 0.8},
        "random_20": {"select": "random"},
        "random_20_weighted": {"select": "random", **weights},
        "prefix_50": {"select": "prefix", "top_entropy_quantile": 0.5, **weights},
        "gmts": {"select": "gmts"},
        "gradient": {"select": "gradient"},
        "covariance": {"select": "covariance"},
        "rsi": {"select": "rsi", "rsi_interval": (0.5, 2.0)},
        "stapo": {"select": "stapo"},
        "rest_20": {"rest_weight": 0.2},
        "normalize_by_response": {"normalize_by": "response"},
        "scope_batch": {"scope": "batch"},
        "scope_microbatch": {"scope": "microbatch"},
        "scope_sequence": {"scope": "sequence"},
        "scope_fixed": {"scope": "fixed", "threshold": 0.672},
    }
    assert {Path(name).stem for name in ABLATION} == set(expected)
    for name in ABLATION:
        assert forks_of(name) == expected[Path(name).stem], name


def test_the_presets_are_the_switches_of_the_paper_and_of_its_code() -> None:
    def switches(name: str) -> tuple[object, ...]:
        spec = load_recipe(RECIPES / "presets" / f"{name}.yaml")
        return spec.forks.scope, spec.forks.entropy_from, spec.loss.reduction, spec.loss.dual_clip, spec.reward.scale

    assert switches("default") == ("minibatch", "old", "token-mean", None, "0/1")
    assert switches("paper") == ("minibatch", "current", "token-mean", None, "0/1")
    assert switches("official_code") == ("microbatch", "current", "official", 10.0, "+-1")
    official = load_recipe(RECIPES / "presets" / "official_code.yaml")
    assert official.optimizer.warmup_steps == 10 * official.train.minibatches


def parameters_on_meta(spec: Recipe, world: int) -> list[int]:
    """Of the first rank of each pipeline stage, built at the model's real size. A tensor on the meta device has a shape and no memory;
    a fake process group has as many ranks as it is told."""
    counts = []
    for stage in range(spec.parallel.pp):
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=stage * world // spec.parallel.pp, world_size=world)
        mesh = build_mesh(spec.parallel, seed=1, device=torch.device("meta"))
        with torch.device("meta"):
            chunks = build_policy(shape_for(spec)[0], PolicyConfig.of(spec), mesh)
        counts.append(sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()))
    return counts


@pytest.mark.parametrize("name", [*CLUSTER, *QUICKSTART])
def test_the_model_is_built_in_its_layout_at_its_real_size(name: str, tmp_path: Path) -> None:
    overrides = []
    if name in QUICKSTART:
        countdown.write_model(tmp_path, seed=1, experts=8 if "moe" in name else 0)
        overrides = [f"model.path={tmp_path}"]
    if lacking() is not None:  # of Transformer Engine, which needs a GPU; its layers have the same parameters
        overrides.append("precision.train_fp8=false")
    planned = plan(name, overrides=overrides)
    built = on_ranks(1, parameters_on_meta, planned.recipe, planned.gpus)[0]
    assert built == [stage.weights.parameters for stage in planned.stages]
    assert sum(stage.layers for stage in planned.stages) == planned.shape.layers
    assert planned.fits or name in CLUSTER  # which names the GPUs that it takes
