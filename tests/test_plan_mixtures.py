"""The whole plan of a mixture of experts: its refits, published layouts, search, and what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from measure import largest_bucket
from rich.console import Console
from test_plan import H100

from megafork.plan.fixes import fixes
from megafork.plan.memory import refit_buffer
from megafork.plan.models import KNOWN
from megafork.plan.planner import Plan, changed, make_plan
from megafork.plan.refit import COMPARED_MIXTURES, refits
from megafork.plan.search import proposals
from megafork.plan.table import render
from megafork.recipe import Recipe, RecipeError
from megafork.weights.reshard import Reshard


def test_the_refits_of_a_mixture_are_compared_and_their_bucket_has_room() -> None:
    shape, spec = KNOWN["qwen3-30b-a3b"], published()
    shape = replace(shape, layers=2, moe=replace(shape.mixture, layers=(0, 1)))
    counted = refits(shape, spec, 16)
    assert [refit.name for refit in counted[:3]] == [
        "TP1 PP1 CP1 EP8 DP16 to TP2",
        "TP1 PP1 CP1 EP8 DP16 to TP4",
        "TP1 PP1 CP1 EP8 DP16 to TP8",
    ]
    assert len(counted) == 1 + 2 * len(COMPARED_MIXTURES)
    for refit in counted:
        assert refit.plan.received == refit.least.received < refit.gather.received
        assert refit.least.between_nodes == refit.plan.between_nodes <= refit.gather.between_nodes
        values = {f"parallel.{key}": value for key, value in refit.layout.model_dump().items()} | {"rollout.tp": refit.rollout_tp}
        needed = largest_bucket(Reshard(shape, refit.layout, 16, refit.rollout_tp))
        assert needed * (1 - 1e-3) <= refit_buffer(shape, changed(spec, values), 16) <= 2 * needed


def published(**changes: Any) -> Recipe:
    """NeMo-RL's Qwen3-30B-A3B in bf16 at 4k on 32 x H100, as its recipe says: train EP 8, roll-out TP 2; 64 prompts of 32 samples."""
    spec = Recipe.model_validate(
        {
            "model": {"path": "Qwen/Qwen3-30B-A3B", "recompute": "full"},
            "parallel": {"ep": 8},
            "data": {"train": "unused.jsonl", "max_prompt_length": 512},
            "rollout": {
                "prompts": 64,
                "samples": 32,
                "max_response_length": 3584,
                "tp": 2,
                "dynamic_sampling": False,
                "park_training": True,
                "max_running": 512,
            },
            "reward": {"overlong": "none"},
        }
    )
    return changed(spec, {name.replace("__", "."): value for name, value in changes.items()})


def planned(gpus: int = 32, mean_response: int | None = None, model: str = "qwen3-30b-a3b", **changes: Any) -> Plan:
    return make_plan(KNOWN[model], published(**changes), gpus, H100, mean_response)


def test_the_published_layouts_fit_and_their_step_times_are_of_the_right_size() -> None:
    """1,102 tokens/s/GPU and 192 s are 3,306 tokens a response. Release 0.4: 506 s for 235B-A22B, with 5,671 tokens."""
    small = planned(mean_response=3255)
    assert small.fits and small.dp == 32
    assert small.step.seconds == pytest.approx(192, rel=0.5) and small.step.tokens_per_s_per_gpu == pytest.approx(1102, rel=0.5)
    layout = {"tp": 2, "cp": 2, "sp": True, "ep": 16, "pp": 8, "first_stage_layers": 11, "last_stage_layers": 11}
    sizes = {"rollout__prompts": 16, "rollout__max_response_length": 7680, "rollout__tp": 16}
    large = planned(128, 5620, "qwen3-235b-a22b", **{f"parallel__{key}": value for key, value in layout.items()}, **sizes)
    assert large.fits and large.step.seconds == pytest.approx(506, rel=0.5)


def test_a_step_pays_for_the_parameters_that_tokens_meet() -> None:
    """Against the same model with all experts for every token."""
    shape = KNOWN["qwen3-30b-a3b"]
    everything = replace(shape, moe=replace(shape.mixture, per_token=128))
    few, all_ = (make_plan(each, published(), 32, H100).step for each in (shape, everything))
    assert all_.score > 8 * few.score and all_.update > 5 * few.update and all_.rollout > few.rollout
    far = planned(parallel__ep=16).step
    assert far.score > few.score, "half of the copies leave the node"


@pytest.mark.slow
def test_search_and_fixes_know_expert_parallelism() -> None:
    plan = planned(16, parallel__ep=1)
    assert "update" in plan.over and {"parallel.ep": 8} in fixes(plan)
    found = proposals(planned(16), show=40)
    assert [one.step.seconds for one in found] == sorted(one.step.seconds for one in found) and len(found) == 40
    for one in found:
        layout = one.recipe.parallel
        assert one.fits and layout.etp is None and (layout.sp or layout.tp == 1)
    assert {one.recipe.parallel.ep for one in found} >= {1, 8}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(found[0], "the planner's table", proposals=found))
    text = console.export_text()
    layout = found[0].recipe.parallel
    for said in (
        "30,532,122,624 parameters, 3,353,032,704 active",
        f"experts ep {layout.ep} x etp 1",
        "layers: fused. With plain ones",
    ):
        assert said in text
    numbers = json.loads(json.dumps(found[0].to_dict()))
    assert (
        numbers["active_parameters"] == 3_353_032_704
        and numbers["other_layers"]["layers"] == "plain"
        and numbers["layout"]["ep"] == layout.ep
    )
    assert numbers["engine"]["experts"] < numbers["engine"]["weights"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel__ep": 3}, r"parallel.ep is 3 but the model has 128 experts"),
        ({"parallel__ep": 64}, r"parallel.ep x etp is 64 x 1 = 64, which does not divide the 32 ranks"),
        ({"parallel__tp": 2}, r"parallel.tp is 2 without parallel.sp"),
        ({"precision__train_fp8": True, "model__kernels": "plain"}, r"precision.train_fp8 is true with model.kernels=plain"),
        (
            {"precision__rollout_fp8": True, "loss__importance_cap": 2.0, "rollout__tp": 4},
            r"192 rows a rank, .*; set rollout.whole_experts",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        planned(**changes)
