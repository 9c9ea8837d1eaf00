"""`megafork eval` as a whole: against transformers' own generation, and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import megafork, start_megafork
from evaluation import options_for, own_verifier, write_rows
from ranks import free_port, on_ranks
from smollm import save_smollm
from task import make_task

from megafork.evaluate.inputs import read_inputs
from megafork.evaluate.options import Decoding, EvaluationOptions
from megafork.evaluate.results import judge_responses
from megafork.rl.fork_temperature import ForkTemperature


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


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
    _check_greedy(options_for(task, samples=1, max_tokens=9, decodings=GREEDY, verifier=own_verifier(tmp_path), out=str(tmp_path)))


@pytest.mark.slow
def test_real_weights(task: Path, tmp_path: Path) -> None:
    """SmolLM2-135M in its chat template."""
    model = save_smollm(tmp_path / "smollm")
    rows = [{"question": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in ((1, 1), (2, 3), (48, 17))]
    source, own = write_rows(tmp_path / "sums.jsonl", rows), own_verifier(tmp_path)
    _check_greedy(
        options_for(
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
    options = options_for(task, samples=8, max_tokens=24, ks=(1, 2, 8), verifier=own_verifier(tmp_path), out=str(tmp_path / "killed"))
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
