"""The recipe for coding tasks: programs are judged correctly, and a tiny model learns from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command import megafork

from megafork.data.reward import Verdict, Verifiers
from megafork.recipe import Reward
from megafork.user_code import import_file

RECIPES = Path(__file__).parents[1] / "recipes" / "code"


pipelines = import_file(RECIPES / "pipelines.py", "pipelines")  # recipes are not a package


def test_every_right_way_passes_and_no_wrong_one_does() -> None:
    items, expected = [], []
    for name, step in pipelines.STEPS.items():
        for texts, accuracy in ((step.right, 1.0), (step.wrong, 0.0)):
            items += [(pipelines.program_text([text]), pipelines.row([name])) for text in texts]
            expected += [Verdict(accuracy)] * len(texts)
    with Verifiers(Reward(verifier="code")) as scorer:
        assert scorer.score(items) == expected


def test_held_out_problems_occur_nowhere_else() -> None:
    rows = pipelines.make_rows(seed=1)
    heldout = {row["prompt"] for row in rows["heldout"]}
    assert len(heldout) == pipelines.HELDOUT_ROWS
    assert heldout.isdisjoint(row["prompt"] for row in rows["train"] + rows["sft"])


def test_the_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pipelines.write_model(tmp_path, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row in pipelines.make_rows(seed=1)["sft"][:300]:
        for text in row.values():
            tokens = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in tokens and len(tokens) < 40 and tokenizer.decode(tokens) == text


@pytest.mark.slow
def test_a_tiny_model_learns_to_write_programs_that_pass(tmp_path: Path) -> None:
    """The recipe, shortened: from under half to well above in six steps."""
    task = tmp_path / "runs" / "code-sft" / "task"
    task.mkdir(parents=True)
    for name, rows in pipelines.make_rows(seed=1).items():
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipelines.write_model(task / "model", seed=1)
    for command, recipe, changes in (
        ("sft", "sft.yaml", ("train.steps=120",)),
        ("train", "train.yaml", ("train.steps=6", "eval.every=6", "reward.workers=2")),
    ):
        done = megafork(command, str(RECIPES / recipe), *changes, cwd=tmp_path, limit_s=280)
        assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "runs" / "code" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [step["accuracy/mean"] for step in steps if "accuracy/mean" in step]
    assert len(accuracies) == 6 and accuracies[-1] > accuracies[0] + 0.15
    assert all(step["reward/errors"] == 0 for step in steps if "reward/errors" in step)
    assert yaml.safe_load((tmp_path / "runs" / "code" / "recipe.yaml").read_text())["reward"]["verifier"] == "code"
