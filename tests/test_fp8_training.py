"""Training in FP8: refused wherever it would not really be FP8, and what it requires of packing and plan. The products themselves need
Transformer Engine and a GPU: `tools/gpu_check.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from responses import make_responses
from task import make_task, write_recipe
from tiny import recipe

from megafork import doctor
from megafork.commands import preflight
from megafork.model import precision
from megafork.parallel.context import zigzag_index
from megafork.plan.hardware import gpu_named
from megafork.plan.models import KNOWN
from megafork.plan.planner import make_plan
from megafork.recipe import Precision, Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.rl.packing import pack

ROOT = Path(__file__).parent.parent
ON = Precision(dtype="bf16", train_fp8=True)
FP8 = ("precision.train_fp8=true", "precision.dtype=bf16")
SHAPE = KNOWN["qwen3-32b"]


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
        precision.check_training(SHAPE, ON, tp)
    with pytest.raises(RecipeError, match=r"^precision\.train_fp8 is true: at parallel\.tp=16 a rank's qkv size is 640|mlp size is 1600"):
        precision.check_training(SHAPE, ON, 16)
    alone = replace(SHAPE, heads=6, kv_heads=1, head_dim=32)  # its heads make whole blocks with keys and values alone
    for part, shape in {"hidden": replace(SHAPE, hidden=5184), "mlp": replace(SHAPE, ffn=25664), "attention": alone}.items():
        with pytest.raises(RecipeError, match=rf"a rank's {part} size is \d+, no multiple of the 128 of a block"):
            precision.check_training(shape, ON, 1)


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


def projections() -> dict[str, int]:
    """Weights of one layer of Qwen3-32B, by hand."""
    return {"qkv": 5120 * (64 + 2 * 8) * 128, "proj": 64 * 128 * 5120, "fc1": 5120 * 2 * 25600, "fc2": 25600 * 5120}
