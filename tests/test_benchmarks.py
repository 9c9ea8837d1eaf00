"""The benchmarks' own arithmetic, and that they run at small sizes next to the peers' installed code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import on_ranks

from benchmarks import document
from benchmarks.__main__ import NAMES, RESULTS
from benchmarks.figure import Figure, Series, interleaved

ROOT = Path(__file__).resolve().parent.parent


def test_a_ratio_is_the_median_of_neighbours() -> None:
    # the machine was three times slower in the second round: the ratio of each round is 4
    figure = Figure("head", "s", Series("ours", [1.0, 3.0, 1.0]), Series("peer", [4.0, 12.0, 5.0]))
    assert figure.ratio == 4.0
    assert figure.summary()["peer"] == {"name": "peer", "median": 5.0, "min": 4.0, "max": 12.0, "repeats": 3}
    assert Figure("kernels", "s", note="not run: no GPU").summary()["ratio"] is None


def times_and_order() -> tuple[dict[str, Series], list[str]]:
    order: list[str] = []

    def first() -> None:
        order.append("first")
        time.sleep(0.1 if dist.get_rank() == 1 else 0.0)

    return interleaved({"first": first, "second": lambda: order.append("second")}, repeats=2), order


def test_times_are_the_slowest_rank_s_and_taken_in_turn() -> None:
    for times, order in on_ranks(2, times_and_order):
        assert order == ["first", "second"] * 3  # one round is not counted
        assert [len(series.values) for series in times.values()] == [2, 2]
        assert min(times["first"].values) >= 0.1 > min(times["second"].values)
        assert max(times["first"].cpu) < 0.1  # it slept


def test_the_page_says_what_the_results_say() -> None:
    assert document.PAGE.read_text() == document.render(RESULTS, NAMES), "write it again: python -m benchmarks"


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    names = ("threshold", "head_memory", "head_time", "kernels")  # layouts and refit run in tests/test_update.py and tests/test_refit.py
    subprocess.run([sys.executable, "-m", "benchmarks", *names, "--quick", "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=280)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(results) == set(names)
    for result in results.values():
        assert result["versions"]["torch"] and result["machine"]["cores"] >= 1
    growth = {
        side: [figure[side]["median"] for figure in results["head_memory"]["figures"] if figure["peer"]["name"] == "verl"]
        for side in ("ours", "peer")
    }
    assert growth["peer"][1] > 15 * growth["peer"][0]  # the tokens grow 16 times
    assert growth["ours"][1] < 3 * growth["ours"][0]
