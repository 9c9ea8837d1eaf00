"""The planner against models that were actually built, and against what a forward and backward actually allocate."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from command import megafork
from fp8 import EXPERTS, WIDE
from measure import largest_bucket
from public_models import MODELS
from rich.console import Console
from safetensors.torch import load_file
from tiny import recipe, save_model

from megafork.convert.convert import megatron_to_hf
from megafork.plan.fixes import fixes
from megafork.plan.hardware import FRAGMENTS, GPUS, RESERVED, VLLM_ASLEEP, gpu_named
from megafork.plan.memory import engine_memory, refit_buffer
from megafork.plan.models import KNOWN, shape_for
from megafork.plan.parameters import count_parameters
from megafork.plan.planner import Plan, changed, gpus_for, make_plan
from megafork.plan.refit import COMPARED, count_refit, refits
from megafork.plan.search import proposals
from megafork.plan.table import render
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.shape import read_shape
from megafork.weights.mapping import huggingface_shapes
from megafork.weights.reshard import Reshard, needed

H100 = gpu_named("h100")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def test_parameters_of_published_models() -> None:
    """Totals of the safetensors files on the hub."""
    published = {"qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "qwen3-4b": 4_022_468_096}
    assert {name: count_parameters(KNOWN[name]) for name in published} == published


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Llama-3.1-8B-Instruct", "Mistral-Nemo-Base-2407", "phi-4"])
def test_parameters_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert count_parameters(read_shape(tmp_path)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_engine_holds_the_parts_that_it_loads(tp: int, architecture: str, tiny: Path) -> None:
    shape = replace(read_shape(tiny), tied=False, architecture=architecture)
    spec = recipe(tiny, rollout={"tp": tp, "kv_cache_mb": 8})
    engine = engine_memory(shape, spec, H100)
    parts = [part for name in huggingface_shapes(shape) for part in needed(name, shape, tp, 0)]
    assert engine.weights == 4 * sum(math.prod(stop - start for start, stop in filter(None, part)) for part in parts)
    assert engine.token == 2 * 4 * max(2 // tp, 1) * 32 * 4  # k and v, layers, groups, head_dim, fp32
    assert engine.concurrent == (8 << 20) // (engine.token * 64)
    for kept, width in (("fp8", 1), ("bfloat16", 2), ("auto", 4)):
        spec = recipe(tiny, rollout={"tp": tp, "engine": {"kv_cache_dtype": kept}}, loss={"importance_cap": 2.0})
        assert engine_memory(shape, spec, H100).token == engine.token // 4 * width


@pytest.mark.parametrize(("architecture", "sizes"), [("Qwen3", WIDE), ("Qwen3Moe", EXPERTS)])
def test_an_engine_in_fp8_holds_what_vllm_would(architecture: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """The bytes of an FP8 folder, less the padding of its vocabulary."""
    folder = save_model(tmp_path / "in", architecture, dtype=torch.bfloat16, **sizes)
    megatron_to_hf(folder, tmp_path / "fp8", fp8=True)
    spec = recipe(folder, precision={"dtype": "bf16", "rollout_fp8": True}, loss={"importance_cap": 2.0})
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "fp8/model.safetensors").values())
    assert engine_memory(read_shape(folder), spec, H100).weights == stored


def test_servers_take_vllm_off_the_trainers_gpus() -> None:
    recipe_32b = load_recipe(Path(__file__).parents[1] / "recipes/qwen3_32b_fork.yaml")
    values = recipe_32b.model_dump()
    values["rollout"] |= {"servers": ["http://a:8000", "http://b:8000", "http://b:8001"], "staleness": 1}
    values["loss"]["importance_cap"] = 2.0
    shape = KNOWN["qwen3-32b"]
    together, apart = (make_plan(shape, spec, 32, H100) for spec in (recipe_32b, Recipe(**values)))
    stages = list(zip(together.stages, apart.stages, strict=True))
    assert all(one.phases["update"] - other.phases["update"] == VLLM_ASLEEP for one, other in stages)
    assert all(one.phases["rollout"] - other.phases["rollout"] == one.engine.pool for one, other in stages)
    assert apart.step.gpus == 32 + 3 * 4
    assert apart.step.seconds == max(apart.step.rollout, apart.step.score + apart.step.update + apart.step.refit)
    assert apart.step.rollout > together.step.rollout, "three engines instead of eight"


def published() -> Recipe:
    """NeMo-RL's Qwen3-32B in bf16 at 4k on 32 x H100: train TP 4 x PP 4, roll-out TP 4; 64 prompts of 32 samples."""
    return Recipe.model_validate(
        {
            "model": {"path": "Qwen/Qwen3-32B", "recompute": "full"},
            "parallel": {"tp": 4, "pp": 4, "sp": True},
            "data": {"train": "unused.jsonl", "max_prompt_length": 512},
            "rollout": {"prompts": 64, "samples": 32, "max_response_length": 3584, "tp": 4, "dynamic_sampling": False},
            "reward": {"overlong": "none"},
        }
    )


def planned(model: str = "qwen3-32b", gpus: int = 32, mean_response: int | None = None, **changes: Any) -> Plan:
    """Of `published()` with `changes`, whose keys are written section__key."""
    spec = changed(published(), {name.replace("__", "."): value for name, value in changes.items()})
    return make_plan(KNOWN[model], spec, gpus, H100, mean_response)


def test_the_published_layout_fits_and_its_step_time_is_of_the_right_size() -> None:
    plan = planned(mean_response=3354)
    assert plan.fits and plan.dp == 2
    assert plan.step.seconds == pytest.approx(376, rel=0.5)
    assert plan.step.tokens_per_s_per_gpu == pytest.approx(571, rel=0.5)


def test_a_step_without_a_scoring_pass_has_no_time_for_it() -> None:
    sources: dict[str, Any] = {"forks__entropy_from": "rollout", "loss__old_log_prob": "rollout"}
    plain, without, one_only = planned().step, planned(**sources).step, planned(forks__entropy_from="rollout").step
    twice = planned(forks__entropy_from="current", loss__old_log_prob="rollout").step
    assert without.score == 0 < plain.score == one_only.score == twice.score / 2
    assert without.seconds == pytest.approx(plain.seconds - plain.score)


LONG: dict[str, Any] = {"rollout__max_response_length": 20480, "data__max_prompt_length": 2048}


def test_what_does_not_fit_is_named_with_the_keys_that_make_it_fit() -> None:
    kept = planned(gpus=128, model__recompute="none", **LONG)
    assert set(kept.over) == {"update"}
    assert {"model.recompute": "full"} in fixes(kept)
    crowded = planned(rollout__gpu_memory_fraction=0.8)
    assert "rollout" in crowded.over
    assert [set(changes) for changes in fixes(crowded)] == [{"rollout.park_training"}, {"rollout.gpu_memory_fraction"}]
    no_cache = planned(rollout__gpu_memory_fraction=0.2)
    assert no_cache.over["cache"] > 0 and no_cache.stages[0].engine.concurrent == 0
    both = planned(gpus=128, model__recompute="none", rollout__gpu_memory_fraction=0.9, **LONG)
    assert {"rollout", "update"} < set(both.over)
    assert {"rollout.gpu_memory_fraction", "model.recompute"} in [set(changes) for changes in fixes(both)]
    for plan in (kept, crowded, no_cache, both):
        assert not plan.fits and fixes(plan)
        for changes in fixes(plan):
            assert plan.with_changes(changes).fits
    hopeless = planned(gpus=8, parallel__tp=8, parallel__pp=1)
    assert not hopeless.fits and fixes(hopeless) == []


def test_the_optimizers_step_has_room_where_a_rank_keeps_much_of_it() -> None:
    alone, shared = (planned(gpus=gpus).stages[0] for gpus in (16, 128))
    assert alone.weights.step_bytes == 4 * alone.weights.parameters > alone.activations.total
    assert alone.phases["update"] - alone.state == RESERVED + VLLM_ASLEEP + alone.weights.step_bytes
    assert shared.phases["update"] - shared.state == RESERVED + VLLM_ASLEEP + math.ceil(shared.activations.total * (1 + FRAGMENTS))


def test_search_proposes_layouts_that_fit_quickest_first() -> None:
    found = proposals(planned("qwen3-8b", 16, rollout__tp=2), show=5)
    assert len(found) == 5
    assert [plan.step.seconds for plan in found] == sorted(plan.step.seconds for plan in found)
    for plan in found:
        layout = plan.recipe.parallel
        assert plan.fits and 16 % layout.model_size == 0 and layout.tp * layout.cp <= 8
        assert plan.to_dict() == make_plan(plan.shape, plan.recipe, 16, H100).to_dict()
    assert proposals(planned(gpus=4, parallel__pp=1)) == []


def test_doubling_the_gpus_never_slows_a_step_nor_swells_a_rank() -> None:
    for few, many in itertools.pairwise(planned(gpus=gpus) for gpus in (16, 32, 64, 128)):
        assert many.step.seconds < few.step.seconds
        assert max(many.peaks.values()) < max(few.peaks.values())


@pytest.mark.slow
def test_a_refit_is_counted_beside_a_full_gather_and_the_least_possible() -> None:
    counted = refits(KNOWN["qwen3-32b"], published(), 64)
    assert [refit.name for refit in counted[:3]] == ["TP4 PP4 CP1 DP4 to TP4", "TP8 PP4 CP1 DP2 to TP4", "TP8 PP4 CP1 DP2 to TP8"]
    assert len(counted) == 2 * len(COMPARED)
    for refit in counted:
        assert refit.plan.received == refit.least.received < refit.gather.received
        assert refit.least.between_nodes == refit.plan.between_nodes <= refit.gather.between_nodes
    bytes_ = counted[2].to_dict()
    assert bytes_["plan"]["received"] == 2 * counted[2].plan.received == pytest.approx(6.24e9, rel=0.01)
    assert bytes_["lower_bound"]["between_nodes"] == pytest.approx(8 * 0.75 * 65.52e9, rel=0.01)  # 3 of 4 stages, once for each node
    with pytest.raises(RecipeError, match=r"rollout.tp is 3, which does not divide the 64 ranks"):
        count_refit(KNOWN["qwen3-32b"], COMPARED[0], 64, 3)


@pytest.mark.parametrize(
    ("tp", "pp", "gpus", "engine"),
    [(1, 1, 8, 1), (8, 1, 16, 4), (4, 2, 16, 8), (1, 2, 16, 8), (2, 4, 32, 8), (4, 4, 64, 8), (8, 4, 64, 4), (8, 8, 64, 2), (4, 8, 64, 1)],
)
def test_the_refit_bucket_has_room(tp: int, pp: int, gpus: int, engine: int) -> None:
    shape = replace(KNOWN["qwen3-32b"], layers=8)
    spec = changed(published(), {"parallel.tp": tp, "parallel.pp": pp, "parallel.sp": tp > 1, "rollout.tp": engine})
    needed = largest_bucket(Reshard(shape, spec.parallel, gpus, engine))
    assert needed * (1 - 1e-3) <= refit_buffer(shape, spec, gpus) <= 2 * needed  # norms are left out


def test_tables_fit_80_columns_and_show_the_numbers_that_json_holds() -> None:
    plan = planned()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(plan, "the planner's table", refits(plan.shape, plan.recipe, 32), [plan]))
    text = console.export_text()
    numbers = json.loads(json.dumps(plan.to_dict()))
    for stage in numbers["stages"]:
        assert f"{stage['parameters']:,}" in text and f"{stage['optimizer'] / 2**30:.2f}" in text
    for said in ("32,762,123,264 parameters", f"{numbers['engine']['token']:,} bytes", f"{numbers['step']['update']:,.0f}", "fits: the"):
        assert said in text
    assert re.search(r"^TP4 PP4 CP1 DP2 to TP4 +12\.5 +12\.5 +61\.6 ", text, re.MULTILINE), "a row is one line"
    assert re.search(r"^ *4 +4 +1 +1 +on +2 +full +60% ", text, re.MULTILINE)


def test_the_shape_comes_from_the_folder_else_from_its_name(tiny: Path) -> None:
    assert shape_for(recipe(tiny))[0] == read_shape(tiny)
    assert shape_for(recipe(Path("Qwen/Qwen3-14B-Base")))[0] == KNOWN["qwen3-14b"]
    with pytest.raises(RecipeError, match=r"model.path is 'nowhere': no such folder.*qwen3-32b"):
        shape_for(recipe(Path("nowhere")))


def test_wrong_input_is_one_clear_line() -> None:
    with pytest.raises(RecipeError, match=r"--gpu is 'b9000'.*h100"):
        gpu_named("b9000")
    with pytest.raises(RecipeError, match="--gpus is 0"):
        planned(gpus=0)
    with pytest.raises(RecipeError, match="4 x 4 x 1 = 16, which does not divide the 24 ranks"):
        planned(gpus=24)
    with pytest.raises(RecipeError, match=r"rollout.max_response_length is 1\d+ but the model knows 40960 positions"):
        planned(rollout__max_response_length=100_000)
    with pytest.raises(RecipeError, match=r"rollout.tp is 3"):
        planned(gpus=48, rollout__tp=3)
    with pytest.raises(RecipeError, match=r"precision.rollout_fp8 is true: gate_proj has 192 rows a rank, no multiple of the 128"):
        planned(
            "qwen3-0.6b",
            64,
            parallel__tp=1,
            parallel__sp=False,
            parallel__pp=1,
            rollout__tp=16,
            loss__importance_cap=2.0,
            precision__rollout_fp8=True,
        )
    with pytest.raises(RecipeError, match=r"--mean-response is 9000: .* from 1 to rollout.max_response_length=3584"):
        planned(mean_response=9000)
    assert gpus_for(published(), None) == 16 and gpus_for(published(), 32) == 32
    assert set(GPUS) == {"h100", "h200", "a100"}


ROOT = Path(__file__).parent.parent


def megafork_plan(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    with patch.dict(os.environ, COLUMNS="80"):
        return megafork("plan", *arguments, cwd=cwd)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(published().to_yaml())
    done = megafork_plan("recipe.yaml", "--gpus", "64", "--gpu", "h200", "--refit", "--search", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["fits"] and numbers["gpus"] == 64 and numbers["gpu"] == "h200" and len(numbers["stages"]) == 4
    assert numbers["refit"][0]["full_gather"]["received"] > numbers["refit"][0]["plan"]["received"]
    assert numbers["search"][0]["step"]["seconds"] <= numbers["search"][-1]["step"]["seconds"]
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80

    failed = megafork_plan("recipe.yaml", "rollout.gpu_memory_fraction=0.9", "--gpus", "16", cwd=tmp_path)
    assert (failed.returncode, failed.stderr) == (1, "")
    assert "does not fit" in failed.stdout and "rollout.gpu_memory_fraction=0." in failed.stdout
    wrong = megafork_plan("recipe.yaml", "--gpus", "24", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("megafork: parallel.tp x pp x cp is 4 x 4 x 1 = 16, which does not divide the 24 ranks")


@pytest.mark.slow
def test_the_page_shows_what_the_command_says() -> None:
    blocks = re.findall(r"```console\n\$ megafork plan ([^|\n]*).*?\n(.*?)```", (ROOT / "docs/plan.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for arguments, shown in blocks:
        said, wanted = (_untimed(text) for text in (megafork_plan(*arguments.split()).stdout, shown))
        assert said[-len(wanted) :] == wanted, arguments


def _untimed(text: str) -> list[str]:
    """Lines without the one number that depends on the machine."""
    return [re.sub(r"^(refit's plan) +[\d.,]+", r"\1", line.rstrip()) for line in text.splitlines()]
