"""Training in FP8: refused wherever it would not really be FP8, and what it requires of packing and plan. The products themselves need
Transformer Engine and a GPU: `tools/gpu_check.py`."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from responses import make_responses
from rich.console import Console
from task import make_task, write_recipe
from tiny import recipe

from megafork import doctor
from megafork.commands import preflight
from megafork.model import precision
from megafork.parallel.context import zigzag_index
from megafork.plan.hardware import gpu_named
from megafork.plan.models import KNOWN
from megafork.plan.planner import make_plan
from megafork.plan.table import render
from megafork.recipe import Parallel, Precision, Recipe, RecipeError
from megafork.recipe.model import Kernels
from megafork.recipe_file import load_recipe
from megafork.rl.packing import pack
from megafork.shape import Shape

ROOT = Path(__file__).parent.parent
ON = Precision(dtype="bf16", train_fp8=True)
FP8 = ("precision.train_fp8=true", "precision.dtype=bf16")
SHAPE = KNOWN["qwen3-32b"]


def check(shape: Shape = SHAPE, kernels: Kernels = "auto", **layout: Any) -> None:
    precision.check_training(shape, ON, Parallel(**layout), kernels)


def of_tp(tp: int, **parallel: object) -> Recipe:
    return recipe(Path("Qwen/Qwen3-32B"), parallel={"tp": tp, **parallel}, precision={"dtype": "bf16", "train_fp8": True})


@pytest.mark.skipif(precision.lacking() is None, reason="this machine can train in FP8")
def test_a_machine_that_would_train_in_something_else_is_refused_before_any_rank_starts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    task = make_task(tmp_path, **sizes)
    spec = load_recipe(write_recipe(task), list(FP8))
    for command in ("train", "sft"):
        with pytest.raises(RecipeError, match=r"^precision\.train_fp8 is true but (Transformer Engine is not installed|there is no GPU)"):
            preflight(command, spec, 1)
    findings = [finding for finding in doctor.examine(spec) if finding.name == "precision.train_fp8"]
    assert len(findings) == 1 and not doctor.can_run(findings)
    assert not [finding for finding in doctor.examine(load_recipe(write_recipe(task))) if finding.name == "precision.train_fp8"]


def test_wrong_recipes_are_refused(tmp_path: Path) -> None:
    file = write_recipe(make_task(tmp_path))
    with pytest.raises(RecipeError, match=r"^precision\.train_fp8 is true with precision\.dtype=fp32: .*set dtype=bf16$"):
        load_recipe(file, [FP8[0], "precision.dtype=fp32"])
    for tp in (1, 2, 4, 8):
        check(tp=tp)
    with pytest.raises(RecipeError, match=r"^precision\.train_fp8 is true: at parallel\.tp=16 a rank's qkv size is 640|mlp size is 1600"):
        check(tp=16)
    alone = replace(SHAPE, heads=6, kv_heads=1, head_dim=32)  # its heads make whole blocks with keys and values alone
    for part, shape in {"hidden": replace(SHAPE, hidden=5184), "mlp": replace(SHAPE, ffn=25664), "attention": alone}.items():
        with pytest.raises(RecipeError, match=rf"a rank's {part} size is \d+, no multiple of the 128 of a block"):
            check(shape)


def test_experts_train_in_fused_layers_and_in_whole_blocks() -> None:
    shape = KNOWN["qwen3-30b-a3b"]  # experts of 6 blocks; its unused intermediate_size need not be whole blocks
    odd = replace(shape, ffn=6145)
    layouts: list[dict[str, Any]] = [{}, {"tp": 2, "sp": True}, {"ep": 8}, {"ep": 8, "etp": 3}, {"ep": 8, "tp": 4, "sp": True}]
    for layout in layouts:
        check(shape, **layout)
        check(odd, **layout)
    wrong: dict[str, tuple[Shape, Kernels, dict[str, Any]]] = {
        "with model.kernels=plain: experts multiply in FP8 in fused layers only; set kernels=auto, or train_fp8=false": (
            shape,
            "plain",
            {},
        ),
        ": at parallel.tp=4 a rank's expert size is 192, .*: choose a smaller tp, or": (shape, "auto", {"tp": 4, "sp": True}),
        ": at parallel.etp=4 a rank's expert size is 192, .*: choose a smaller etp, or": (shape, "auto", {"ep": 8, "etp": 4}),
        ": at parallel.etp=1 a rank's expert size is 96, .*: set train_fp8=false": (
            replace(shape, moe=replace(shape.mixture, ffn=96)),
            "auto",
            {"ep": 8},
        ),
        ": at parallel.tp=1 a rank's mlp size is 6145": (replace(odd, moe=replace(shape.mixture, layers=(1,))), "auto", {}),
    }
    for message, (model, kernels, layout) in wrong.items():
        with pytest.raises(RecipeError, match=f"^precision.train_fp8 is true ?{message}"):
            check(model, kernels, **layout)


LAYOUTS = [({}, 128), ({"tp": 4}, 128), ({"tp": 4, "sp": True}, 512), ({"tp": 2, "sp": True, "cp": 2}, 512), ({"cp": 4}, 512)]


@pytest.mark.parametrize(("layout", "padding"), LAYOUTS)
def test_every_rank_s_share_of_a_micro_batch_is_whole_blocks(layout: dict[str, int], padding: int) -> None:
    spec = of_tp(**{"tp": 1, **layout})
    assert spec.micro_batch_padding == padding
    assert recipe(Path("x"), parallel=layout).micro_batch_padding == 1
    cp, split = spec.parallel.cp, spec.parallel.tp if spec.parallel.sp else 1
    batches = [make_responses([(3, 4), (60, 70), (1, 1)]), make_responses([(100, 29)]), []]
    for responses in batches:
        for rank in range(cp):
            plain = pack(responses, cp=cp, cp_rank=rank, multiple=spec.parallel.sequence_multiple)
            padded = pack(responses, cp=cp, cp_rank=rank, multiple=spec.parallel.sequence_multiple, whole=padding)
            assert padded.tokens.size(1) % (128 * split) == 0 and padded.tokens.size(1) - plain.tokens.size(1) < padding
            assert padded.lengths[: len(plain.lengths)] == plain.lengths, "real sequences are as they were"
            for name in ("positions", "targets", "sequence", "offset"):
                assert torch.equal(getattr(padded, name), getattr(plain, name))
            assert torch.equal(padded.tokens[:, : plain.tokens.size(1)], plain.tokens)
            zigzag_index(padded.lengths, cp, rank)  # raises for what CP cannot split


def test_the_plan_counts_the_copies_and_the_products() -> None:
    file = ROOT / "recipes/qwen3_32b_fork_fp8.yaml"
    fp8, bf16 = (make_plan(SHAPE, load_recipe(file, change), 64, gpu_named("h100")) for change in ([], ["precision.train_fp8=false"]))
    inside = sum(size for name, size in projections().items()) // 4  # at TP 4
    for stage, plain in zip(fp8.stages, bf16.stages, strict=True):
        assert stage.fp8_copies == pytest.approx(2 * stage.layers * inside, rel=1e-3) and plain.fp8_copies == 0
        assert stage.phases["rollout"] - plain.phases["rollout"] == stage.fp8_copies
    assert bf16.step.update / 1.4 < fp8.step.update < bf16.step.update
    assert fp8.step.rollout == bf16.step.rollout


def test_the_plan_counts_the_experts_of_a_rank() -> None:
    file = ROOT / "recipes/qwen3_30b_a3b_fork.yaml"
    shape, changes = KNOWN["qwen3-30b-a3b"], ["precision.train_fp8=true", "parallel.ep=8"]
    plan = make_plan(shape, load_recipe(file, changes), 16, gpu_named("h100"))
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    inside = attention // 2 + 128 // 8 * (2048 * 2 * 768 + 768 * 2048)
    assert (plan.recipe.parallel.tp, plan.recipe.parallel.pp) == (2, 1) and plan.with_other_layers is None
    assert [stage.fp8_copies for stage in plan.stages] == [pytest.approx(2 * 48 * inside, rel=1e-3)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(plan, "the planner's table"))
    assert "layers: fused, which alone have experts in FP8" in console.export_text()
    bf16 = make_plan(shape, load_recipe(file, ["precision.train_fp8=false", "parallel.ep=8"]), 16, gpu_named("h100"))
    assert bf16.step.update / 1.4 < plan.step.update < bf16.step.update


def projections() -> dict[str, int]:
    """Weights of one layer of Qwen3-32B, by hand."""
    return {"qkv": 5120 * (64 + 2 * 8) * 128, "proj": 64 * 128 * 5120, "fc1": 5120 * 2 * 25600, "fc2": 25600 * 5120}
