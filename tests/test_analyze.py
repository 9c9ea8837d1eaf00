"""`megafork analyze`: its statistics against numpy and sets, its entropies against transformers, its memory, and mistakes in its input."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command import megafork, run_on_forks
from hypothesis import given
from hypothesis import strategies as st
from ranks import free_port, on_ranks
from smollm import save_smollm
from task import make_task, write_recipe
from tiny import save_model

from megafork.analyze import responses
from megafork.analyze.inputs import AnalysisInputs, read_inputs
from megafork.analyze.options import AnalysisOptions
from megafork.analyze.overlap import ChangeByBin, Overlap
from megafork.analyze.sorted_stream import SortedStream, kept
from megafork.analyze.statistics import analyse
from megafork.convert.convert import megatron_to_hf
from megafork.parallel.quantile import top_threshold
from megafork.recipe import RecipeError

ENTROPIES = st.lists(st.floats(0, 12, width=32) | st.sampled_from([0.0, 0.5, 1e-7]), min_size=1, max_size=60)
"""With ties and tiny ones."""


def _stream(values: np.ndarray, parts: int = 3) -> SortedStream:
    return SortedStream(lambda: np.array_split(values, parts))


@given(ENTROPIES, st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_percentiles_are_those_of_numpy(values: list[float], shares: list[int]) -> None:
    array = np.array(values, dtype=np.float32)
    want = np.percentile(array.astype(np.float64), shares)
    np.testing.assert_allclose(_stream(array).percentiles(shares), want, rtol=1e-12, atol=1e-15)


@given(ENTROPIES, st.data())
def test_sums_of_the_largest_are_those_of_a_sort(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, dtype=np.float32)
    counts = data.draw(st.lists(st.integers(0, len(values)), min_size=1, max_size=5))
    largest = np.sort(array.astype(np.float64))[::-1]
    np.testing.assert_allclose(_stream(array).sums_of_largest(counts), [largest[:count].sum() for count in counts], rtol=1e-12, atol=1e-15)


@given(ENTROPIES, st.sampled_from([0.01, 0.2, 0.25, 0.5, 0.999, 1.0]))
def test_the_threshold_is_the_trainers(values: list[float], rho: float) -> None:
    array = np.array(values, dtype=np.float32)
    want = top_threshold(torch.from_numpy(array), rho, group=None)
    assert _stream(array).threshold(rho) == want.tau
    assert (array >= np.float32(want.tau)).sum() == want.selected >= kept(rho, len(values))


def test_what_is_no_entropy_is_refused() -> None:
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and not below 0"):
            _stream(np.array([0.0, wrong], dtype=np.float32))
    assert _stream(np.array([-0.0], dtype=np.float32)).total == 1


def _overlap_by_sets(first: np.ndarray, second: np.ndarray, rho: float) -> float:
    """Of two models' entropies at the same positions, none tied."""
    count = math.ceil(rho * len(first))
    one, other = (set(np.argsort(-values)[:count].tolist()) for values in (first, second))
    return len(one & other) / count


@given(st.integers(0, 10_000), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_overlap_is_that_of_sets(seed: int, lengths: list[int], rho: float) -> None:
    generator = np.random.default_rng(seed)
    parts = [generator.permuted(np.arange(2 * n, dtype=np.float32))[: 2 * n].reshape(2, n) + generator.random((2, n)) for n in lengths]
    parts = [part.astype(np.float32) for part in parts]
    whole = np.concatenate(parts, axis=1)
    counted = Overlap([_stream(row).threshold(rho) for row in whole], rho)
    for part in parts:
        counted.add(part)
    if all(len(np.unique(row)) == len(row) for row in whole):
        assert counted.pooled[0, 1] == pytest.approx(_overlap_by_sets(whole[0], whole[1], rho), abs=1e-12)
        assert counted.per_response[0, 1] == pytest.approx(np.mean([_overlap_by_sets(part[0], part[1], rho) for part in parts]), abs=1e-12)
    assert np.diag(counted.pooled) == pytest.approx([1, 1]) and counted.pooled[0, 1] == counted.pooled[1, 0]


def test_change_by_bin_is_the_mean_in_each() -> None:
    generator = np.random.default_rng(3)
    base, later = generator.exponential(size=(2, 500)).astype(np.float32)
    edges = [0.1, 0.5, 0.5, 2.0]
    counted = ChangeByBin(edges, 2)
    for part in np.array_split(np.arange(500), 7):
        counted.add(base[part], np.stack([base, later])[:, part])
    for number, (low, high) in enumerate(pairwise([-1, *edges, 99])):
        inside = (base >= np.float32(low)) & (base < np.float32(high))
        assert counted.counts[number] == inside.sum()
        same, moved = (means[number] for means in counted.means())
        assert same == (0 if inside.any() else None)
        assert moved == (pytest.approx((later - base)[inside].mean(), abs=1e-6) if inside.any() else None)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def _options(task: Path, **changes: Any) -> AnalysisOptions:
    values: dict[str, Any] = {
        "model": str(task / "model"),
        "prompts": str(task / "held_out.jsonl"),
        "template": "plain",
        "samples": 3,
        "max_tokens": 16,
        "min_count": 5,
        "ranks": None,
        "kv_cache_mb": 32,
        "out": str(task / "analysis"),
    }
    return AnalysisOptions(**{**values, **changes})


def _made_up(inputs: AnalysisInputs, tokens: int, length: int = 500) -> None:
    """Files of an analysis as `score` leaves them, of responses of `length` tokens with entropies from a seed."""
    count = tokens // length
    groups = [min(responses.AT_ONCE, count - start) for start in range(0, count, responses.AT_ONCE)]
    generator = np.random.default_rng(0)
    prompt = next(iter(inputs.job.prompts))
    row = {"prompt": prompt, "sample": 0, "prompt_tokens": [1], "truncated": False, "response": ""}
    written = ([{**row, "tokens": generator.integers(0, 13, length, dtype=np.int32)} for _ in range(size)] for size in groups)
    responses._write(inputs.responses, responses._RESPONSES, inputs.identity, written)
    for label in inputs.models:
        entropies = (
            [{"entropies": generator.exponential(size=length).astype(np.float32), "log_probs": []} for _ in range(n)] for n in groups
        )
        responses.write_entropies(inputs, label, entropies)


def test_memory_does_not_grow_with_the_tokens(task: Path, tmp_path: Path) -> None:
    """A million tokens of two models, against a quarter of them."""
    peaks = []
    for tokens in (250_000, 1_000_000):
        inputs = read_inputs(_options(task, against=(f"base={task / 'model'}",), out=str(tmp_path / str(tokens))))
        _made_up(inputs, tokens)
        tracemalloc.start()
        results = analyse(inputs)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert results["tokens"] == tokens
        assert results["entropies"]["model"]["mean"] == pytest.approx(1, abs=0.01)
        assert results["entropies"]["model"]["percentiles"][80] == pytest.approx(math.log(5), abs=0.02), "of the exponential distribution"
        assert results["entropies"]["model"]["top_share"][20] == pytest.approx(0.2 * (1 + math.log(5)), abs=0.01)
        assert results["overlap"]["pooled"][0][1] == pytest.approx(0.2, abs=0.01), "of independent entropies"
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 100e6


def _reference(folder: Path, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Entropies by transformers in fp32, one response at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
            log_p = model(ids).logits[0, len(row["prompt_tokens"]) - 1 : -1].log_softmax(-1)
            found.append(-(log_p.exp() * log_p).sum(-1).numpy())
    return found


def _check(out: Path, models: dict[str, Path], results: dict[str, Any], rho: float) -> None:
    """An analysis' files and results against transformers."""
    rows = pq.read_table(out / "responses.parquet").to_pylist()
    reference = {label: _reference(folder, rows) for label, folder in models.items()}
    assert results["labels"] == list(models) and results["responses"] == len(rows)
    for label, entropies in reference.items():
        stored = pq.read_table(out / f"entropies/{label}.parquet")["entropies"].to_pylist()
        flat, want = np.concatenate(stored), np.concatenate(entropies)
        assert [len(one) for one in stored] == [len(row["tokens"]) for row in rows]
        assert np.abs(flat - want).max() < 1e-4
        found = results["entropies"][label]
        assert found["mean"] == pytest.approx(want.mean(), abs=1e-4)
        assert np.abs(np.array(found["percentiles"]) - np.percentile(want, range(101))).max() < 1e-4
        assert found["share_below_0.01"] == (want < 0.01).mean()
        largest = np.sort(want)[::-1]
        assert found["top_share"][20] == pytest.approx(largest[: math.ceil(0.2 * len(want))].sum() / want.sum(), abs=1e-4)
        assert sum(found["histogram"]["counts"]) == len(want) and sum(found["histogram"]["selected"]) >= math.ceil(rho * len(want))
    for a, first in enumerate(reference.values()):
        for b, second in enumerate(reference.values()):
            pooled = _overlap_by_sets(np.concatenate(first), np.concatenate(second), rho)
            apart = np.mean([_overlap_by_sets(x, y, rho) for x, y in zip(first, second, strict=True)])
            assert results["overlap"]["pooled"][a][b] == pytest.approx(pooled, abs=1e-12)
            assert results["overlap"]["per_response"][a][b] == pytest.approx(apart, abs=1e-12)
    ids, own = np.concatenate([row["tokens"] for row in rows]), np.concatenate(list(reference.values())[-1])
    highest = max((n for n in set(ids.tolist()) if (ids == n).sum() >= results["min_count"]), key=lambda n: own[ids == n].mean())
    top = results["vocabulary"]["highest"][0]
    assert (top["id"], top["count"]) == (highest, (ids == highest).sum())
    assert top["mean"] == pytest.approx(own[ids == highest].mean(), abs=1e-4)


def _sample_and_score(each: list[AnalysisOptions], port: int) -> None:
    """On a rank: what `launch.analyze` does before its statistics."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.analyze.score import score_responses
    from megafork.rollout.sample import sample

    for options in each:
        inputs = read_inputs(options)
        if any(inputs.job.missing()):
            sample(inputs.job, inputs.author.tensors(), torch.device("cpu"))
        torch.distributed.barrier()
        score_responses(inputs, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"cp": 2}, {}], ids=["TP2", "PP2", "CP2", "DP2"])
def test_entropies_are_those_of_transformers_under_any_layout(layout: dict[str, int], task: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(task / "model", other)
    save_model(other, vocab_size=13, num_hidden_layers=2, seed=5)
    options = _options(task, against=(f"other={other}",), out=str(tmp_path / "out"), rho=0.3, **layout)
    shutil.copytree(_completions(task), tmp_path / "out/completions")
    on_ranks(2, _sample_and_score, [options], free_port(), engines=True)
    _check(tmp_path / "out", {"other": other, "model": task / "model"}, analyse(read_inputs(options)), 0.3)


def _completions(task: Path) -> Path:
    """Sampled once for all layouts."""
    folder = task / "sampled"
    if not folder.exists():
        on_ranks(1, _sample_and_score, [_options(task, out=str(folder))], free_port(), engines=True)
    return folder / "completions"


@pytest.mark.slow
def test_a_run_is_compared_with_its_checkpoints(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    write_recipe(task, train={"steps": 2}, checkpoint={"every": 1, "keep_last": 3}, optimizer={"lr": 3e-3})
    run_on_forks("sft", task / "recipe.yaml")
    options = ["--prompts=held_out.jsonl", "--template=plain", "--samples=3", "--max-tokens=12", "--kv-cache-mb=32", "--min-count=5"]
    command = ["analyze", "runs/run", *options, "--out=analysis", "--json"]
    done = megafork(*command, cwd=task)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    megatron_to_hf(task / "runs/run/checkpoints/step_000001", task / "first")
    models = {"base": task / "model", "step_000001": task / "first", "final": task / "runs/run/hf"}
    _check(task / "analysis", models, results, 0.2)
    assert json.loads((task / "analysis/analysis.json").read_text()) == results
    page = (task / "analysis/report.html").read_text()
    assert all(heading in page for heading in ("Where the forks are", "Which tokens fork", "From checkpoint to checkpoint", "Responses"))

    shutil.rmtree(task / "analysis/logs")
    (task / "analysis/entropies/base.parquet").write_bytes(b"PAR1 half-written")
    again = megafork(*command, cwd=task)
    assert json.loads(again.stdout.splitlines()[-1]) == results, "a damaged file is written again"
    shutil.rmtree(task / "analysis/logs")
    third = megafork(*command, cwd=task)
    assert json.loads(third.stdout.splitlines()[-1]) == results
    assert not (task / "analysis/logs").exists(), "the same call starts no rank"


@pytest.mark.slow
def test_real_weights(tmp_path: Path) -> None:
    """SmolLM2-135M in its chat template."""
    model = save_smollm(tmp_path / "smollm")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is 12 + 30?"}\n{"prompt": "Name a prime number."}\n')
    options = AnalysisOptions(
        model=str(model),
        prompts=str(tmp_path / "prompts.jsonl"),
        template="chat",
        samples=2,
        max_tokens=16,
        min_count=2,
        dtype="fp32",
        kv_cache_mb=64,
        out=str(tmp_path / "out"),
    )
    on_ranks(1, _sample_and_score, [options], free_port(), engines=True)
    _check(tmp_path / "out", {"smollm": model}, analyse(read_inputs(options)), 0.2)


def test_wrong_settings(task: Path, tmp_path: Path) -> None:
    wider = save_model(Path(shutil.copytree(task / "model", tmp_path / "wider")), vocab_size=13, hidden_size=32)
    words = Path(shutil.copytree(task / "model", tmp_path / "words"))
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    names = list(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = dict(zip([*names[:-1], "ten"], range(13), strict=True))
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = str(task / "model")
    for changes, message in (
        ({"rho": 0.0}, r"--rho is 0\.0: must be above 0 and at most 1"),
        ({"temperature": 0.0}, r"--temperature is 0\.0: must be between 0\.01 and 100; greedy tokens have no entropy"),
        ({"samples": 0}, "--samples is 0: must be at least 1"),
        ({"seed": 1 << 63}, "--seed is 9223372036854775808: must be from 0 to 9223372036854775807"),
        ({"kv_cache_mb": 0}, "--kv-cache-mb is 0: must be from 1 to 16777216"),
        ({"ranks": 3, "tp": 2}, "--ranks is 3, not a multiple of --tp x --pp x --cp = 2"),
        ({"tp": 3}, "^--tp is 3 but the model has 4 attention heads"),
        ({"model": "./nowhere"}, "MODEL is './nowhere': no such folder"),
        ({"prompts": "nowhere.jsonl"}, "--prompts is 'nowhere.jsonl': no such file"),
        ({"max_tokens": 600}, "--max-tokens is 600 and the longest prompt has 4 tokens, but the model knows 512 positions"),
        ({"against": (model,)}, "two models are named 'model': label one of them by LABEL=MODEL"),
        ({"against": (f"a/b={model}",)}, "'a/b' is used as a file name"),
        ({"against": (str(wider),)}, "--against wider .* has a different shape than model"),
        ({"against": (str(words),)}, "--against words has a different vocabulary .*: compare checkpoints of one model"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            read_inputs(_options(task, **changes))
        assert "\n" not in str(caught.value)


def test_files_of_other_responses_are_not_mixed(task: Path, tmp_path: Path) -> None:
    options = _options(task, out=str(tmp_path))
    inputs = read_inputs(options)
    _made_up(inputs, 2000)
    file = inputs.entropies("model")
    assert responses.is_current(file, inputs.identity_of("model"))
    for changed in (
        replace(options, samples=4),
        replace(options, temperature=0.5),
        replace(options, limit=3),
        replace(options, dtype="bf16"),
    ):
        assert not responses.is_current(file, read_inputs(changed).identity_of("model"))
    file.write_bytes(file.read_bytes()[:-50])
    assert not responses.is_current(file, inputs.identity_of("model"))
    with pytest.raises(RecipeError, match=r"model\.parquet' is damaged"):
        list(responses.read_lists(file, "entropies"))
