"""The command line: wrong input is one line and exit code 2 before any rank starts; a good run prints only its own lines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import megafork
from safetensors.torch import load_file, save_file
from task import make_task, write_recipe
from tiny import save_model

from megafork.commands import preflight
from megafork.recipe import RecipeError
from megafork.recipe_file import load_recipe


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_task(tmp_path)
    write_recipe(tmp_path, run={"folder": "runs"}, model={"path": "model"}, data={"train": "train.jsonl", "eval": "held_out.jsonl"})
    return tmp_path


def refused(*overrides: str, command: Any = "train") -> str:
    """The one line that answers a wrong recipe."""
    recipe = load_recipe("recipe.yaml", list(overrides))
    with pytest.raises(RecipeError) as caught:
        preflight(command, recipe, recipe.run.ranks or recipe.parallel.model_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYOUTS = {
    ("parallel.tp=3",): "parallel.tp is 3 but the model has 4 attention heads: choose a tp that divides them",
    ("parallel.tp=2", "run.ranks=3"): "parallel.tp x pp x cp is 2 x 1 x 1 = 2, which does not divide the 3 ranks: start a multiple",
    ("rollout.tp=2", "run.ranks=3"): "rollout.tp is 2, which does not divide the 3 ranks: choose one that does",
    ("rollout.tp=8", "run.ranks=8"): "rollout.tp is 8 but the model has 4 attention heads",
    ("parallel.pp=2", "parallel.vpp=2"): "parallel.pp is 2, vpp 2, but the model has 2 layers: each stage needs equally many",
    ("parallel.pp=2", "parallel.first_stage_layers=2"): "parallel.pp is 2, first_stage_layers 2, but the model has 2 layers",
    ("rollout.max_response_length=600", "train.micro_batch_tokens=608"): "is 608 but the model knows 512 positions",
    ("model.path=nowhere",): "model.path is 'nowhere': no such folder; give a Hugging Face model folder",
    ("data.train=nowhere.jsonl",): "data.train is 'nowhere.jsonl': no such file; give a .jsonl, .json or .parquet file",
    (
        "data.max_prompt_length=3",
    ): "data.train: train.jsonl line 1 has a prompt of 4 tokens, over data.max_prompt_length=3: raise the limit",
    ("reward.verifier=exakt",): "reward.verifier is 'exakt': did you mean 'exact'?",
    ("reward.verifier=nowhere.py:score",): "reward.verifier is 'nowhere.py:score': no such file",
}


@pytest.mark.parametrize("overrides", LAYOUTS)
def test_what_does_not_fit_together(overrides: tuple[str, ...], task: Path) -> None:
    assert LAYOUTS[overrides] in refused(*overrides)


def _without(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).unlink()

    return change


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _wrote(config: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / "config.json").write_text(config)

    return change


def _cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return changed


NORM = "model.norm.weight"
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (_without("model.safetensors"), "it has no model.safetensors and no model.safetensors.index.json"),
    "no config": (_without("config.json"), "it has no config.json; give a Hugging Face model folder"),
    "no tokenizer": (_without("tokenizer.json"), "the folder has no tokenizer"),
    "broken config": (_wrote("{"), "its config.json is not valid JSON"),
    "a list for a config": (_wrote("[]"), "its config.json holds a list"),
    "another architecture": (_config(architectures=["GPT2LMHeadModel"]), "a GPT2LMHeadModel: megafork trains Qwen3ForCausalLM"),
    "sliding window": (_config(use_sliding_window=True), "its use_sliding_window is True"),
    "cut weights": (_cut, "model.safetensors in 'model' is damaged or truncated"),
    "a missing tensor": (_tensors(lambda tensors: tensors.pop(NORM)), f"its tensors do not fit its config.json: missing {NORM}"),
    "another shape": (_tensors(lambda tensors: tensors.update({NORM: torch.ones(3)})), f"{NORM} is [3], config.json says [64]"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_folder(name: str, task: Path) -> None:
    damage, message = MODELS[name]
    damage(task / "model")
    assert message in refused()


def test_a_tokenizer_of_another_model(task: Path) -> None:
    make_task(task / "small", vocab_size=5)
    assert "its tokenizer has ids up to 12 but the model only 5 tokens" in refused("model.path=small/model")


ROWS = {
    '{"prompt": "max 1 2 ="}': 'data.train: train.jsonl line 1 has no answer (its fields: prompt): give it an "answer", name the answer',
    "": "data.train is 'train.jsonl': it has no rows; give a dataset with at least one prompt",
    '{"prompt": "max 1 2 =", "answer": "2"': "data.train: train.jsonl line 1 is not valid JSON",
}


@pytest.mark.parametrize("rows", ROWS)
def test_wrong_rows(rows: str, task: Path) -> None:
    (task / "train.jsonl").write_text(rows)
    assert ROWS[rows] in refused()


def test_supervised_rows_that_are_too_long_or_have_no_response(task: Path) -> None:
    assert "train.jsonl line 1 has a response of 2 tokens with its end token, rollout.max_response_length is 1" in refused(
        "rollout.max_response_length=1", command="sft"
    )
    (task / "train.jsonl").write_text('{"prompt": "max 1 2 =", "answer": "2"}')
    assert "line 1 has no response" in refused(command="sft")


def test_an_objective_that_cannot_be_computed(task: Path) -> None:
    assert "loss.objective is 'gpso': did you mean 'gspo'?" in refused("loss.objective=gpso")
    with pytest.raises(RecipeError, match=r"^loss.dual_clip is 10.0 with loss.objective=sapo: only `clip` has it"):
        load_recipe("recipe.yaml", ["loss.objective=sapo", "loss.dual_clip=10"])
    (task / "own.py").write_text("def own(tokens, loss):\n    return tokens.old_log_prob, tokens.advantage > 0\n")
    assert "must return finite losses that depend on tokens.log_prob" in refused("loss.objective=own.py:own")


def test_a_verifier_that_cannot_be_loaded(task: Path) -> None:
    (task / "mine.py").write_text("import nonsense\ndef score(text, row): return 1")
    assert "it cannot be loaded; fix the file or its imports (ModuleNotFoundError: No module named 'nonsense')" in refused(
        "reward.verifier=mine.py:score"
    )
    (task / "mine.py").write_text("def score(text, row): return 1")
    assert "(AttributeError: module 'mine' has no attribute 'skore')" in refused("reward.verifier=mine.py:skore")


def test_a_verifier_of_ones_own_needs_no_answers(task: Path) -> None:
    (task / "mine.py").write_text("def score(text, row): return 1")
    (task / "train.jsonl").write_text('{"prompt": "max 1 2 ="}')
    (task / "held_out.jsonl").write_text('{"prompt": "max 1 3 ="}')
    assert preflight("train", load_recipe("recipe.yaml", ["reward.verifier=mine.py:score"]), 1)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "recipe.yaml", "train.stps=5"), "unknown key train.stps = 5: did you mean 'steps'?"),
        (
            ("train", "recipe.yaml", "data.train=empty.jsonl"),
            "data.train is 'empty.jsonl': it has no rows; give a dataset with at least one",
        ),
        (("train", "nowhere.yaml"), "does not exist: give the path of a .yaml file"),
        (("report", "model"), "RUN is 'model': it has no metrics.jsonl; give a run folder such as runs/quickstart"),
        (("eval", "model", "--benchmarks=amc24"), "--benchmarks names 'amc24': did you mean 'amc23'?"),
        (("eval", "model", "--benchmarks=a.jsonl", "--samples=4", "--k=8"), "--k is 8 but --samples is 4: draw at least k samples"),
        (("analyze", "model", "--prompts=empty.jsonl", "--out=runs"), "--prompts is 'empty.jsonl': it has no rows"),
        (("doctor", "recipe.yaml", "--json"), None),
        (("doctor", "broken.yaml"), "unknown section 'modle': did you mean 'model'?"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str | None, task: Path) -> None:
    (task / "empty.jsonl").touch()
    (task / "broken.yaml").write_text("modle: {path: x}\n")
    done = megafork(*arguments, cwd=task)
    if message is None:
        assert (done.returncode, done.stderr) == (0, ""), done
        assert json.loads(done.stdout.splitlines()[-1])["can_run"] is True
        return
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megafork: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (task / "runs").exists()


@pytest.mark.slow
def test_doctor_fails_for_a_recipe_that_cannot_run(task: Path) -> None:
    (task / "train.jsonl").unlink()
    done = megafork("doctor", "recipe.yaml", "--json", cwd=task)
    assert (done.returncode, done.stderr) == (1, "")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout.splitlines()[-1])["findings"]}
    assert not findings["data.train"]["ok"]


@pytest.mark.slow
def test_a_run_folder_that_the_recipe_does_not_fit(task: Path) -> None:
    done = megafork("sft", "recipe.yaml", "train.steps=2", "--json", cwd=task)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1])["run"] == "runs/run"
    recipe = load_recipe("recipe.yaml", ["train.steps=2"])
    assert preflight("sft", recipe, 1)[1] == 2

    assert "run.name is 'run', which is a run of `megafork sft`: choose another run.name" in refused()
    make_task(task / "other", num_hidden_layers=4)
    assert "model.path is 'other/model': its layers is 4, not the 2 that the run 'run' was started with" in refused(
        "model.path=other/model", command="sft"
    )
    assert "data.train is 'held_out.jsonl', which is not what the run 'run' was started with" in refused(
        "data.train=held_out.jsonl", "data.eval=null", command="sft"
    )
    assert "run.seed is 8, not the 7 that the run 'run' was started with" in refused("run.seed=8", command="sft")

    checkpoint = task / "runs/run/checkpoints/step_000002"
    part = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert f"the checkpoint step_000002 is damaged ({part.name} has {len(whole) - 1} of {len(whole)} bytes): delete" in refused(
        command="sft"
    )
    part.unlink()
    assert f"({part.name} has 0 of {len(whole)} bytes)" in refused(command="sft")
    part.write_bytes(whole)
    for name in ("common.pt", ".metadata"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:50])
        assert "the checkpoint step_000002 is damaged" in refused(command="sft")
        (checkpoint / name).write_bytes(content)
    assert preflight("sft", recipe, 1)[1] == 2


VERIFIER = """
import time

def score(response, row):
    if row["answer"] == "9":
        raise ZeroDivisionError("nine")
    if row["answer"] == "0":
        time.sleep(60)
    return response.strip() == row["answer"]
"""


@pytest.mark.slow
def test_a_whole_run_with_a_verifier_that_raises_and_hangs(task: Path) -> None:
    """Nothing is forked here: the command, its ranks and their engines start as for a user."""
    (task / "mine.py").write_text(VERIFIER)
    rows = [{"prompt": f"max {n} {n} =", "answer": str(n)} for n in range(8)] + [{"prompt": "max 9 8 =", "answer": "9"}]
    (task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *(sys.executable, "-m", "megafork.cli", "train", "recipe.yaml", "reward.verifier=mine.py:score", "reward.timeout_s=6"),
        *("rollout.prompts=9", "rollout.samples=2", "rollout.dynamic_sampling=false", "train.minibatches=1", "run.ranks=2", "--json"),
        *("train.steps=2", "data.eval=null"),
    ]
    done = subprocess.run(command, cwd=task, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stderr) == (0, ""), "nothing but its own lines"
    lines = done.stdout.splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 2 and last["reward/errors"] == 4  # two responses to each of two prompts
    notes = [line.strip() for line in lines if "could not be judged" in line]
    assert len(notes) == 1 and notes[0].startswith("4 responses could not be judged and count as wrong: ")
    assert "ZeroDivisionError: nine" in notes[0] or "timeout: no verdict within 6 s" in notes[0]
    assert [line.split()[0] for line in lines if "/2 " in line] == ["1/2", "2/2"]
    assert (task / "runs/run/logs/rank_1.log").read_text() == ""


@pytest.mark.slow
def test_convert(tmp_path: Path) -> None:
    """There by the command, back by the script that stands for the same command."""
    save_model(tmp_path / "model")
    there = megafork("convert", "hf-to-megatron", "model", "megatron", "--tp", "2", "--verify", "--json", cwd=tmp_path)
    assert there.returncode == 0 and there.stderr == "", there.stderr
    assert json.loads(there.stdout.splitlines()[-1])["logit_difference"] < 1e-4
    script = Path(__file__).parents[1] / "tools" / "convert" / "megatron_to_hf.py"
    back = [sys.executable, str(script), "megatron", "back"]
    assert subprocess.run(back, cwd=tmp_path, timeout=240, check=False).returncode == 0
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    wrong = megafork("convert", "megatron-to-hf", "megatron", "back", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "megafork: DST is 'back': it already exists; delete it, or choose another name\n")
