"""`megafork eval`: its numbers against brute force and transformers, its files after a kill, and mistakes in its input."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from command import megafork, start_megafork
from held import another
from hypothesis import given
from hypothesis import strategies as st
from ranks import free_port, on_ranks
from smollm import save_smollm
from task import make_task
from tiny import save_model

from megafork import commands
from megafork.convert.convert import hf_to_megatron
from megafork.convert.named import NamedModel, find_model
from megafork.data.prompts import Prompt
from megafork.data.reward import Verifiers
from megafork.data.templates import template_text
from megafork.data.tokenizer import load_tokenizer
from megafork.evaluate.benchmarks import KNOWN, load_benchmarks
from megafork.evaluate.inputs import read_inputs
from megafork.evaluate.judge import Answered, judge
from megafork.evaluate.metrics import estimate, majority_at, pass_at
from megafork.evaluate.options import Decoding, EvaluationOptions, decodings
from megafork.evaluate.results import judge_responses
from megafork.recipe import Data, RecipeError, Reward
from megafork.rl.fork_temperature import ForkTemperature, sweep
from megafork.rollout.engine import Completion
from megafork.rollout.store import Store

SAMPLES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 3)), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=7)


def _subsets(samples: list[Any], k: int) -> list[tuple[Any, ...]]:
    return list(itertools.combinations(samples, k))


@given(SAMPLES, st.data())
def test_pass_at_k_is_the_mean_best_of_all_subsets(samples: list[Any], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    accuracies = [accuracy for _, accuracy in samples]
    best = [max(subset) for subset in _subsets(accuracies, k)]
    assert pass_at(accuracies, k) == pytest.approx(sum(best) / len(best))


@pytest.mark.parametrize(("n", "right", "k"), [(16, 0, 8), (16, 3, 8), (16, 9, 8), (16, 16, 1), (200, 7, 100)])
def test_pass_at_k_is_the_unbiased_estimator(n: int, right: int, k: int) -> None:
    want = 1 - math.comb(n - right, k) / math.comb(n, k)
    assert pass_at([1.0] * right + [0.0] * (n - right), k) == pytest.approx(want, abs=1e-12)


def _majority(subset: tuple[tuple[int | None, float], ...], accuracy: dict[int, float]) -> float:
    votes = [vote for vote, _ in subset if vote is not None]
    if not votes:
        return 0.0
    most = max(votes.count(vote) for vote in votes)
    winners = [vote for vote in set(votes) if votes.count(vote) == most]
    return sum(accuracy[vote] for vote in winners) / len(winners)


@given(SAMPLES, st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(samples: list[Any], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    voters = {vote: [a for other, a in samples if other == vote] for vote, _ in samples if vote is not None}
    accuracy = {vote: sum(each) / len(each) for vote, each in voters.items()}
    want = [_majority(subset, accuracy) for subset in _subsets(samples, k)]
    got = majority_at([a for _, a in samples], [vote for vote, _ in samples], k)
    assert got == pytest.approx(sum(want) / len(want))


def test_maj_at_k_of_many_samples_is_quick() -> None:
    started = time.process_time()
    value = majority_at([1.0] * 20 + [0.0] * 44, [0] * 20 + list(range(1, 45)), 32)
    assert value > 0.99 and time.process_time() - started < 5


def test_the_interval_is_that_of_resampled_problems() -> None:
    """Of problems that are right or wrong, the resampled mean is binomial."""
    n, right = 40, 10
    values = [1.0] * right + [0.0] * (n - right)
    result = estimate(values)
    share = [math.comb(n, c) * (right / n) ** c * (1 - right / n) ** (n - c) for c in range(n + 1)]
    low = next(c for c in range(n + 1) if sum(share[: c + 1]) >= 0.025)
    high = next(c for c in range(n + 1) if sum(share[: c + 1]) >= 0.975)
    assert result.mean == right / n
    assert result.low == pytest.approx(low / n, abs=1e-12) and result.high == pytest.approx(high / n, abs=1e-12)
    assert estimate(values) == result, "the same each time"
    assert estimate([0.3]).low == estimate([0.3]).high == pytest.approx(0.3)


def _problem(answer: str) -> Prompt:
    return Prompt(0, "?", (1,), {"prompt": "?", "answer": answer})


def _answered(*texts: str) -> list[Answered]:
    return [Answered(text, len(text), False) for text in texts]


def test_equal_answers_vote_together() -> None:
    first = _answered(r"\boxed{0.5}", r"\boxed{3}", r"so \boxed{\frac{1}{2}}", r"\boxed{\frac{6}{2}}", "3", r"\boxed{ }", r"\boxed{1/2}")
    second = _answered(r"\boxed{2}</think>\boxed{1}", r"\boxed{1.0}")
    with Verifiers(Reward(verifier="math", overlong="none")) as verifiers:
        one, other = judge([_problem("1/2"), _problem("7")], [first, second], verifiers, "math")
    assert one.accuracies == [1, 0, 1, 0, 0, 0, 1]
    assert one.votes[0] == one.votes[2] == one.votes[6] and one.votes[1] == one.votes[3] != one.votes[0]
    assert one.votes[4:6] == [None, None], "without a box, or with an empty one, it does not vote"
    assert other.accuracies == [0, 0] and other.votes[0] == other.votes[1]
    assert (one.lengths[1], one.errors) == (len(first[1].text), [])


def test_other_verifiers_compare_texts() -> None:
    with Verifiers(Reward(verifier="exact", overlong="none")) as verifiers:
        (judged,) = judge([_problem("5")], [_answered("5", "5.0", " 5 ", "")], verifiers, "exact")
    assert judged.accuracies == [1, 0, 1, 0] and judged.votes == [0, 1, 0, None]


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
    options = _options(task, out=str(tmp_path), verifier="exact")
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


def _rows(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


SCHEMAS: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "max 1 2 =", "solution": "...", "answer": "2", "url": "", "year": "2024"},
    "amc23": {"id": 0, "question": "max 1 2 =", "answer": 2.0, "url": ""},
    "minerva": {"question": "max 1 2 =", "answer": "2"},
    "olympiad": {"id": 1606, "question": "max 1 2 =", "solution": ["..."], "final_answer": ["$1$", "$2$"], "is_multiple_answer": True},
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_of_the_hubs_schemas(ending: str, task: Path, tmp_path: Path) -> None:
    words = [f"{name}={_rows(tmp_path / f'{name}.{ending}', [row, row])}" for name, row in SCHEMAS.items()]
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
    words = ("once=" + _rows(tmp_path / "once.jsonl", rows), "x32=" + _rows(tmp_path / "x32.jsonl", [*rows * 32, other]))
    remarks: list[str] = []
    tokenizer = load_tokenizer(str(task / "model"))
    once, many = load_benchmarks(words, Data(train="unused"), limit=None, reward=Reward(), tokenizer=tokenizer, remark=remarks.append)
    assert [(p.text, p.row["answer"]) for p in many.problems[:6]] == [(p.text, p.row["answer"]) for p in once.problems]
    assert len(many.problems) == 7, "the same prompt with another answer is another problem"
    assert remarks == ["--benchmarks x32: 186 of 193 rows repeat a prompt with its answer and are not counted again"]


def test_a_benchmark_is_a_folder_or_a_glob_too(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    for n in range(2):
        _rows(tmp_path / f"mine/test-{n}.parquet", [{"problem": f"max {n} 4 =", "gold": "4"}])
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
    odd = _rows(tmp_path / "odd.jsonl", [{"task": "1 2 =", "gold": 2}])
    asked = {"model": str(model), "benchmarks": (odd,), "columns": "{prompt: task, answer: gold}"}

    def prompt(**options: Any) -> tuple[str, int]:
        problem = read_inputs(_options(task, **asked, **options)).benchmarks[0].problems[0]
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


def _options(task: Path, **changes: Any) -> EvaluationOptions:
    values: dict[str, Any] = {
        "model": str(task / "model"),
        "benchmarks": (str(task / "held_out.jsonl"),),
        "samples": 4,
        "template": "plain",
        "verifier": "exact",
        "workers": 1,
        "ranks": 1,
        "kv_cache_mb": 32,
        "out": str(task / "evaluations"),
    }
    return EvaluationOptions(**{**values, **changes})


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
        read_inputs(_options(task, **changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_wrong_files(task: Path, tmp_path: Path) -> None:
    unanswered = _rows(tmp_path / "mine.jsonl", [{"prompt": "max 1 2 =", "answer": "2"}, {"question": "max 1 3 =", "level": 2}])
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
            read_inputs(_options(task, **changes))
    assert read_inputs(_options(task, benchmarks=(unanswered,), verifier=_own(tmp_path))).benchmarks, (
        "a verifier of one's own needs no answer"
    )
    shutil.copytree(task / "model", tmp_path / "run/hf")
    assert read_inputs(_options(task, model=str(tmp_path / "run"))).model.folder == tmp_path / "run/hf"


def _own(folder: Path) -> str:
    """Right if the answer stands anywhere in the response: of a random model some are, and some are not."""
    (folder / "own.py").write_text("def score(text, row):\n    return row['answer'] in text.split()\n")
    return f"{folder / 'own.py'}:score"


def test_a_verifier_that_fails_on_everything_fails_the_evaluation(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def score(text, row):\n    return {}[text]\n")
    for verifier, code in ((f"{tmp_path / 'own.py'}:score", commands.FAILED), ("exact", commands.DONE)):
        options = _options(task, samples=1, limit=2, verifier=verifier, out=str(tmp_path))
        job = read_inputs(options).job()
        with job.store(job.samplings[0]).append(0) as write:
            for prompt, sample in job.missing()[0]:
                write((prompt, sample), Completion([3], [-1.0], False, [0]), "2")
        assert commands.evaluate(options)[0] == code
        assert ("the verifier failed on all 2 responses to" in "".join(capsys.readouterr())) == bool(code)


def _evaluate(each: list[EvaluationOptions], port: int) -> list[Any]:
    """On a rank: what `commands.evaluate` does, without starting ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.rollout.sample import sample

    results = []
    for options in each:
        inputs = read_inputs(options)
        sample(inputs.job(), inputs.model.tensors(), torch.device("cpu"))
        torch.distributed.barrier()
        results.append(judge_responses(inputs) if torch.distributed.get_rank() == 0 else None)
    return results


def _lines(options: EvaluationOptions) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(Path(options.out).rglob("part-*.jsonl")) for line in file.read_text().splitlines()]


def _key(line: dict[str, Any]) -> tuple[int, str]:
    return line["sample"], line["prompt"]


def _numbers(results: Any) -> Any:
    return results["results"]


def _check_greedy(options: EvaluationOptions) -> None:
    """Each decoding of the options must be greedy; against transformers' own generation in fp32, one problem at a time."""
    import transformers

    inputs = read_inputs(options)
    ((results,),) = on_ranks(1, _evaluate, [options], free_port(), engines=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    right, lengths, cut = [], [], []
    for problem in inputs.benchmarks[0].problems:
        prompt, eos = torch.tensor([problem.tokens]), list(inputs.tokenizer.eos_ids)
        greedy = model.generate(prompt, do_sample=False, max_new_tokens=options.max_tokens, eos_token_id=eos, pad_token_id=0)
        answer = greedy[0, prompt.shape[1] :].tolist()
        right.append(float(problem.row["answer"] in inputs.tokenizer.decode(answer).split()))
        lengths.append(len(answer))
        cut.append(float(answer[-1] not in eos))
    count = len(right)
    assert 0 < sum(right) < count and sum(cut) > 0, "choose another seed: the test would show little"
    for row in _numbers(results):
        assert row["by_problem"] == right and row["avg@1"]["mean"] == row["pass@1"]["mean"] == row["maj@1"]["mean"] == sum(right) / count
        assert row["length"]["mean"] == pytest.approx(sum(lengths) / count)
        assert row["truncated"]["mean"] == pytest.approx(sum(cut) / count)
    assert json.loads(Path(results["file"]).read_text()) == json.loads(json.dumps(results))


GREEDY = (Decoding(temperature=0.0), Decoding(forks=ForkTemperature(0.0, 0.0)))
"""A greedy decoding, and one whose forking temperatures are both 0."""


@pytest.mark.slow
def test_greedy_evaluation_is_that_of_transformers(task: Path, tmp_path: Path) -> None:
    _check_greedy(_options(task, samples=1, max_tokens=9, decodings=GREEDY, verifier=_own(tmp_path), out=str(tmp_path)))


@pytest.mark.slow
def test_real_weights(task: Path, tmp_path: Path) -> None:
    """SmolLM2-135M in its chat template."""
    model = save_smollm(tmp_path / "smollm")
    rows = [{"question": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in ((1, 1), (2, 3), (48, 17))]
    source, own = _rows(tmp_path / "sums.jsonl", rows), _own(tmp_path)
    _check_greedy(
        _options(
            task,
            model=str(model),
            benchmarks=(source,),
            template="chat",
            samples=1,
            max_tokens=12,
            decodings=GREEDY,
            dtype="fp32",
            verifier=own,
            kv_cache_mb=64,
            out=str(tmp_path),
        )
    )


def _arguments(options: EvaluationOptions, *more: str) -> list[str]:
    """Of `megafork`, as a user gives them."""
    values = {
        "benchmarks": options.benchmarks[0],
        "samples": options.samples,
        "max-tokens": options.max_tokens,
        "template": options.template,
        "verifier": options.verifier,
        "ranks": 1,
        "kv-cache-mb": 32,
        "out": options.out,
    }
    arguments = [f"--{name}={value}" for name, value in values.items()] + [f"--k={k}" for k in options.ks]
    return ["eval", options.model, *arguments, *more]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stood(task: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL, continued, asked again, and asked for more samples; against two ranks that were never disturbed."""
    options = _options(task, samples=8, max_tokens=24, ks=(1, 2, 8), verifier=_own(tmp_path), out=str(tmp_path / "killed"))
    victim = start_megafork(*_arguments(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (found := list(Path(options.out).rglob("part-0.jsonl"))) or found[0].stat().st_size < 1000:
        assert victim.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    written = found[0].read_text()
    kept = written[: written.rfind("\n") + 1]
    assert 0 < kept.count("\n") < 160

    again = megafork(*_arguments(options, "--json"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    results = json.loads(again.stdout.splitlines()[-1])
    assert found[0].read_text().startswith(kept), "what was there is there, and was not written again"
    assert len(_lines(options)) == len(set(map(_key, _lines(options)))) == 160

    whole, (logs,) = found[0].read_bytes(), Path(options.out).rglob("logs")
    shutil.rmtree(logs)
    third = megafork(*_arguments(options, "--json"), cwd=tmp_path)
    assert json.loads(third.stdout.splitlines()[-1]) == results
    assert found[0].read_bytes() == whole and not logs.exists(), "the same call starts no rank"

    more = read_inputs(replace(options, samples=9)).job().missing()
    assert [sample for _, sample in more[0]] == [8] * 20, "one more sample each, and no other"

    undisturbed = replace(options, ranks=2, out=str(tmp_path / "undisturbed"))
    (at_once,), others = on_ranks(2, _evaluate, [undisturbed], free_port(), engines=True)
    assert others == [None]
    assert _numbers(results) == json.loads(json.dumps(_numbers(at_once))) == _numbers(json.loads(Path(results["file"]).read_text()))
    assert {_key(line): line["tokens"] for line in _lines(undisturbed)} == {_key(line): line["tokens"] for line in _lines(options)}
