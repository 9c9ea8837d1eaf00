"""What `megafork eval` reads and writes: benchmarks, options, its files after a kill, and mistakes in its input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation import options_for, own_verifier, write_rows
from held import another
from task import make_task
from tiny import save_model

from megafork import commands
from megafork.convert.convert import hf_to_megatron
from megafork.convert.named import NamedModel, find_model
from megafork.data.templates import template_text
from megafork.data.tokenizer import load_tokenizer
from megafork.evaluate.benchmarks import KNOWN, load_benchmarks
from megafork.evaluate.inputs import read_inputs
from megafork.evaluate.options import Decoding, decodings
from megafork.recipe import Data, RecipeError, Reward
from megafork.rl.fork_temperature import ForkTemperature, sweep
from megafork.rollout.engine import Completion
from megafork.rollout.store import Store


def _written(folder: Path, *samples: int) -> Path:
    with Store(folder).append(0) as write:
        for sample in samples:
            write(("p", sample), Completion([sample, 5], [0.0, 0.0], sample == 2, [0, 0]), f"text {sample}")
    return folder / "part-0.jsonl"


@pytest.mark.parametrize("end", ['{"prompt": "p", "sam', '{"prompt": "p"}\n', "\0\0\0\n", "[]\n", ""])
def test_a_half_written_line_is_dropped_and_written_again(end: str, tmp_path: Path) -> None:
    file = _written(tmp_path, 1, 2)
    whole = file.read_text()
    file.write_text(whole + end)
    assert [row["text"] for row in Store(tmp_path).rows()] == ["text 1", "text 2"]
    _written(tmp_path, 3)
    assert file.read_text().startswith(whole) and len(file.read_text().splitlines()) == 3
    assert [(row["sample"], row["tokens"], row["truncated"]) for row in Store(tmp_path).rows()] == [
        (1, [1, 5], False),
        (2, [2, 5], True),
        (3, [3, 5], False),
    ]


def test_a_damaged_line_further_up_is_named(tmp_path: Path) -> None:
    file = _written(tmp_path, 1, 2, 3)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(RecipeError, match=r"part-0.jsonl' line 2 is not a completion: delete that line"):
        list(Store(tmp_path).rows())


def test_two_evaluations_do_not_write_one_folder(task: Path, tmp_path: Path) -> None:
    options = options_for(task, out=str(tmp_path), verifier="exact")
    job = read_inputs(options).job()
    with another(job.store(job.samplings[0]).folder), pytest.raises(RecipeError, match=r"--out is .*: another process is writing there"):
        commands.evaluate(options)


def test_the_digest_sees_any_byte_and_no_name(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    digest = NamedModel("", model).digest()
    assert NamedModel("", Path(shutil.copytree(model, tmp_path / "copy"))).digest() == digest
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # the last bit of one weight
    (model / "model.safetensors").write_bytes(weights)
    assert NamedModel("", model).digest() != digest


def test_a_megatron_checkpoint_is_the_model_it_was_made_of(task: Path, tmp_path: Path) -> None:
    hf_to_megatron(task / "model", tmp_path / "megatron", tp=2)
    plain, made = find_model(str(task / "model")), find_model(str(tmp_path / "megatron"))
    assert made.check() == plain.check() and made.tokenizer().eos_ids == plain.tokenizer().eos_ids and made.dtype == "fp32"
    tensors = dict(made.tensors())
    for name, tensor in plain.tensors():
        assert torch.equal(tensors.pop(name), tensor), name
    assert not tensors and len({plain.digest(), made.digest()}) == 2
    file = next((tmp_path / "megatron").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="the checkpoint is damaged"):
        made.check()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


SCHEMAS: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "max 1 2 =", "solution": "...", "answer": "2", "url": "", "year": "2024"},
    "amc23": {"id": 0, "question": "max 1 2 =", "answer": 2.0, "url": ""},
    "minerva": {"question": "max 1 2 =", "answer": "2"},
    "olympiad": {"id": 1606, "question": "max 1 2 =", "solution": ["..."], "final_answer": ["$1$", "$2$"], "is_multiple_answer": True},
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_of_the_hubs_schemas(ending: str, task: Path, tmp_path: Path) -> None:
    words = [f"{name}={write_rows(tmp_path / f'{name}.{ending}', [row, row])}" for name, row in SCHEMAS.items()]
    tokenizer = load_tokenizer(str(task / "model"))
    data = Data(train="unused", max_prompt_length=8)
    found = load_benchmarks((*words,), data, limit=None, reward=Reward(), tokenizer=tokenizer)
    assert [benchmark.name for benchmark in found] == list(SCHEMAS)
    assert [len(benchmark.problems) for benchmark in found] == [1, 1, 1, 1]
    assert [benchmark.problems[0].row["answer"] for benchmark in found] == ["2", "2", "2", "1, 2"]
    assert {benchmark.problems[0].text for benchmark in found} == {"max 1 2 ="}
    assert len(KNOWN) == 6 and all(source.startswith("hub:") for source in KNOWN.values())


def test_a_problem_that_a_file_repeats_is_one_problem(task: Path, tmp_path: Path) -> None:
    """verl's aime-2024.parquet has each of the 30 problems 32 times: they say no more about other problems than 30 rows do."""
    rows = [{"prompt": f"max {a} 4 =", "answer": str(max(a, 4))} for a in range(6)]
    other = {"prompt": "max 0 4 =", "answer": "0"}
    words = ("once=" + write_rows(tmp_path / "once.jsonl", rows), "x32=" + write_rows(tmp_path / "x32.jsonl", [*rows * 32, other]))
    remarks: list[str] = []
    tokenizer = load_tokenizer(str(task / "model"))
    once, many = load_benchmarks(words, Data(train="unused"), limit=None, reward=Reward(), tokenizer=tokenizer, remark=remarks.append)
    assert [(p.text, p.row["answer"]) for p in many.problems[:6]] == [(p.text, p.row["answer"]) for p in once.problems]
    assert len(many.problems) == 7, "the same prompt with another answer is another problem"
    assert remarks == ["--benchmarks x32: 186 of 193 rows repeat a prompt with its answer and are not counted again"]


def test_a_benchmark_is_a_folder_or_a_glob_too(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    for n in range(2):
        write_rows(tmp_path / f"mine/test-{n}.parquet", [{"problem": f"max {n} 4 =", "gold": "4"}])
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(str(task / "model"))
    for word, name in (("mine", "mine"), ("mine/", "mine"), ("m=mine/test-*.parquet", "m"), (str(tmp_path / "mine"), "mine")):
        [found] = load_benchmarks(
            (word,), Data(train="unused", columns={"answer": "gold"}), limit=None, reward=Reward(), tokenizer=tokenizer
        )
        assert (found.name, [p.row["answer"] for p in found.problems]) == (name, ["4", "4"])


def test_prompts_are_encoded_as_the_options_say(task: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(task / "model", tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps(settings | {"bos_token": "max", "chat_template": "{{ messages[0].content }}{% if short %} 1{% endif %}"})
    )
    odd = write_rows(tmp_path / "odd.jsonl", [{"task": "1 2 =", "gold": 2}])
    asked = {"model": str(model), "benchmarks": (odd,), "columns": "{prompt: task, answer: gold}"}

    def prompt(**options: Any) -> tuple[str, int]:
        problem = read_inputs(options_for(task, **asked, **options)).benchmarks[0].problems[0]
        return problem.text, problem.tokens.count(1)

    assert prompt() == ("1 2 =", 0) and prompt(add_bos="true") == ("1 2 =", 1)
    assert prompt(template="chat", chat_template_args="{short: true}") == ("1 2 = 1", 0)
    for options, message in (
        ({"chat_template_args": "{short: true}"}, r"--chat-template-args is \{'short': True\} but --template is '{prompt}'"),
        ({"template": "chat", "chat_template_args": "{long: true}"}, "--chat-template-args has 'long', which the chat template of"),
        ({"add_bos": "perhaps"}, "--add-bos is 'perhaps': must be auto or true or false"),
    ):
        with pytest.raises(RecipeError, match=message):
            prompt(**options)


def test_templates_are_the_papers_and_qwens(task: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(task / "model"))
    ask = "Please reason step by step, and put your final answer within \\boxed{}."
    assert template_text("paper", tokenizer).replace("{prompt}", "Q") == f"User:\nQ\n{ask}\n\nAssistant:\n"
    assert template_text("Q: {prompt}", tokenizer) == "Q: {prompt}"
    with pytest.raises(RecipeError, match=r"--template is 'qwen' but <\|im_start\|> is not a token of"):
        template_text("qwen", tokenizer)
    tokenizer.backend.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    qwen = template_text("qwen", tokenizer).replace("{prompt}", "Q")
    assert qwen == f"<|im_start|>user\nQ\n{ask}<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(RecipeError, match="--template is 'papr': must be one of paper, qwen, plain, chat, or a text"):
        template_text("papr", tokenizer)


def test_what_the_options_ask_for() -> None:
    assert decodings(None, 0.9, None, 0.5, False) == (Decoding(1.0, 0.9),)
    assert decodings(0.0, 1.0, None, 0.5, False) == (Decoding(0.0),)
    assert decodings(None, 1.0, (0.0, 2.0), 0.5, False) == (Decoding(forks=ForkTemperature(0.0, 2.0, 0.5)),)
    assert [decoding.forks for decoding in decodings(None, 0.9, None, 0.5, True)] == sweep(0.5)
    with pytest.raises(RecipeError, match="--temperature and --sweep are given"):
        decodings(1.0, 1.0, None, 0.5, True)
    with pytest.raises(RecipeError, match=r"--temperature is 0\.001: must be 0"):
        decodings(0.001, 1.0, None, 0.5, False)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"ks": (8,)}, "--k is 8 but --samples is 4: draw at least k samples, or choose k from 1 to that"),
    "greedy": (
        {"decodings": (Decoding(temperature=0.0),)},
        "--samples is 4 with greedy decoding (T 0): all are the same, give --samples 1",
    ),
    "name": (
        {"benchmarks": ("amc24",)},
        "--benchmarks names 'amc24': did you mean 'amc23'?",
    ),
    "twice": ({"benchmarks": ("aime24=a.jsonl", "aime24=b.jsonl")}, "--benchmarks names 'aime24' twice"),
    "none": ({"benchmarks": ("",)}, "--benchmarks names none"),
    "file": ({"benchmarks": ("nowhere.jsonl",)}, "--benchmarks nowhere is 'nowhere.jsonl': no such file"),
    "length": ({"max_tokens": 600}, "--max-tokens is 600 and the longest prompt has 4 tokens, but the model knows 512 positions"),
    "ranks": ({"tp": 2, "ranks": 3}, "--tp is 2, which does not divide --ranks 3"),
    "tp": ({"tp": 3, "ranks": None}, "--tp is 3 but the model has 4 attention heads: choose a tp that divides them"),
    "seed": ({"seed": -1}, "--seed is -1: must be from 0 to 9223372036854775807"),
    "cache": ({"kv_cache_mb": 1 << 25}, "--kv-cache-mb is 33554432: must be from 1 to 16777216"),
    "verifier": ({"verifier": "maths"}, "--verifier is 'maths': did you mean 'math'?"),
    "model": ({"model": "./nowhere"}, "MODEL is './nowhere': no such folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case: str, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(task)
    changes, message = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        read_inputs(options_for(task, **changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_wrong_files(task: Path, tmp_path: Path) -> None:
    unanswered = write_rows(tmp_path / "mine.jsonl", [{"prompt": "max 1 2 =", "answer": "2"}, {"question": "max 1 3 =", "level": 2}])
    other = Path(shutil.copytree(task / "model", tmp_path / "other"))
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {"eleven": len(vocabulary["model"]["vocab"])}
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    mute = Path(shutil.copytree(task / "model", tmp_path / "mute"))
    (mute / "tokenizer.json").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("")
    for changes, message in (
        ({"benchmarks": (unanswered,)}, r"--benchmarks mine: mine.jsonl line 2 has no answer \(its fields: question, level\)"),
        ({"model": str(other)}, "its tokenizer has ids up to 13 but the model only 13 tokens: give a folder"),
        ({"model": str(mute)}, "the folder has no tokenizer"),
        ({"model": str(tmp_path / "run")}, "it has neither a config.json nor checkpoints; give"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_inputs(options_for(task, **changes))
    assert read_inputs(options_for(task, benchmarks=(unanswered,), verifier=own_verifier(tmp_path))).benchmarks, (
        "a verifier of one's own needs no answer"
    )
    shutil.copytree(task / "model", tmp_path / "run/hf")
    assert read_inputs(options_for(task, model=str(tmp_path / "run"))).model.folder == tmp_path / "run/hf"


def test_a_verifier_that_fails_on_everything_fails_the_evaluation(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def score(text, row):\n    return {}[text]\n")
    for verifier, code in ((f"{tmp_path / 'own.py'}:score", commands.FAILED), ("exact", commands.DONE)):
        options = options_for(task, samples=1, limit=2, verifier=verifier, out=str(tmp_path))
        job = read_inputs(options).job()
        with job.store(job.samplings[0]).append(0) as write:
            for prompt, sample in job.missing()[0]:
                write((prompt, sample), Completion([3], [-1.0], False, [0]), "2")
        assert commands.evaluate(options)[0] == code
        assert ("the verifier failed on all 2 responses to" in "".join(capsys.readouterr())) == bool(code)
