"""The page of several runs: each curve is plotted where the axes place its metrics, and the differences between the runs are listed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command import megafork
from page import HOSTILE, METRICS, RECIPE, Elements, assert_points, drawing, needs_chromium, read_curve, report, shown_by_a_browser

from megafork.recipe import RecipeError
from megafork.report.comparison import STYLES, write_comparison
from megafork.report.numbers import MISSING

LONGER: list[dict[str, Any]] = [
    {"step": 0, "eval/accuracy": 0.2},
    *({"step": n, "accuracy/mean": 0.1 * n, "entropy/mean": 0.6 - 0.05 * n, "grad_norm": 1, "time/rollout": n} for n in range(1, 6)),
    {"step": 5, "eval/accuracy": 0.5},
]
ALL_TOKENS = {**RECIPE, "run": {"name": "all"}, "train": {"steps": 5}, "forks": {"select": "all"}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    report(tmp_path / "one")
    report(tmp_path / "two", LONGER, None, ALL_TOKENS)
    return [tmp_path / "one", tmp_path / "two"]


def rows_of(html: str) -> dict[str, list[str]]:
    """The cells of every table by their row's head."""
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', html)
    return {head: re.findall("<td>(.*?)</td>", cells) for head, cells in found}


def test_a_figure_holds_the_curves_of_all_runs(runs: list[Path]) -> None:
    page = write_comparison(runs)
    assert page == runs[0].parent / "comparison.html" and not list(runs[0].parent.glob("*.writing"))
    html = page.read_text(encoding="utf-8")
    training, held_out, entropy = (drawing(html, label) for label in ("Accuracy: training", "Accuracy: held out", "Entropy: all"))
    assert [len(part) for part in read_curve(training, "A")] == [1, 1], "a null breaks the curve"
    assert_points(read_curve(training, "B")[0], [(n, 0.1 * n) for n in range(1, 6)])
    assert_points(read_curve(held_out, "A")[0], [(0, 0.25), (3, 0.75)])
    assert_points(read_curve(held_out, "B")[0], [(0, 0.2), (5, 0.5)])
    assert_points(read_curve(entropy, "A")[0], [(row["step"], row["entropy/mean"]) for row in METRICS[1:]])
    assert_points(read_curve(entropy, "B")[0], [(n, 0.6 - 0.05 * n) for n in range(1, 6)])
    assert "step 3\nA 62.0%\nB 30.0%" in [title.text for title in training.iter("title")]
    legends = re.findall(r'<ul class="key">(.*?)</ul>', html)
    assert len(legends) == len(re.findall("<svg", html)) + 1, "one in each figure and one at the head"
    assert set(legends) == {'<li><i class="blue"></i>A sums</li><li><i class="orange"></i>B all</li>'}
    assert read_curve(drawing(html, "Gradient norm"), "A") == [], "a run that lacks the metric is left out of its figure"


def test_tables_set_the_runs_side_by_side(runs: list[Path]) -> None:
    rows = rows_of(write_comparison(runs).read_text(encoding="utf-8"))
    assert rows["steps"] == ["3", "5"]
    assert rows["held-out accuracy"] == ["25.0% → 75.0%", "20.0% → 50.0%"]
    assert rows["threshold τ, nats"] == ["0.800 → 0.500", MISSING]
    assert rows["rollout"] == ["1.5s", "3.0s"]
    assert rows["forks.select"] == ["top", "all"]
    assert rows["forks.top_entropy_quantile"] == ["0.2", MISSING]
    assert rows["train.steps"] == ["3", "5"]
    assert not {"model.path", "run.name"} & set(rows), "only what differs, and not the names"


def test_what_cannot_be_compared(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a run is given twice"):
        write_comparison([runs[0], runs[1], tmp_path / "two" / ".." / "one"])
    with pytest.raises(RecipeError, match=f"RUN is given 9 times: a page compares at most {len(STYLES)} runs"):
        write_comparison([tmp_path / str(n) for n in range(9)])
    with pytest.raises(RecipeError, match=r"metrics\.jsonl' does not exist"):
        write_comparison([runs[0], tmp_path / "nowhere"])
    (tmp_path / "two" / "metrics.jsonl").write_text("")
    with pytest.raises(RecipeError, match=r"two/metrics\.jsonl' has no complete line"):
        write_comparison(runs)


def test_runs_of_one_name_and_without_differences(tmp_path: Path) -> None:
    folders = [tmp_path / seed for seed in ("seed1", "seed2")]
    for folder in folders:
        report(folder)
    html = write_comparison(folders, tmp_path / "pages" / "seeds.html").read_text(encoding="utf-8")
    assert f"A {folders[0]}" in html and f"B {folders[1]}" in html
    assert "<p>Nothing but their names.</p>" in html
    report(tmp_path / "bare", METRICS, None, None)
    bare = write_comparison([folders[0], tmp_path / "bare"]).read_text(encoding="utf-8")
    assert rows_of(bare)["forks.select"] == ["top", MISSING]


def hostile_runs(folder: Path) -> list[Path]:
    for n, name in enumerate(HOSTILE[:3]):
        report(folder / str(n), METRICS, None, {**RECIPE, "run": {"name": name}, "model": {"path": name}})
    return [folder / str(n) for n in range(3)]


def test_hostile_names_stay_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    html = write_comparison(hostile_runs(tmp_path)).read_text(encoding="utf-8")
    elements = Elements(html)
    assert not {tag for tag, _ in elements.found} & {"script", "img", "iframe", "object", "link", "form"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    references = [
        value for _, attributes in elements.found for name, value in attributes.items() if name in ("src", "href", "srcset", "data")
    ]
    assert references and all(reference.startswith("#") for reference in references)
    assert "default-src 'none'" in html


def test_the_command_takes_one_run_or_several(runs: list[Path], tmp_path: Path) -> None:
    for arguments, page in (
        (("one", "two"), str(tmp_path / "comparison.html")),
        (("one", "two", "--out", "both.html"), "both.html"),
        (("one",), "one/report.html"),
        (("one", "--out", "copy.html"), "copy.html"),
    ):
        (tmp_path / page).unlink(missing_ok=True)
        done = megafork("report", *arguments, "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout.splitlines()[-1]) == {"report": page}
        assert (tmp_path / page).read_text(encoding="utf-8").endswith("</html>\n")
    wrong = megafork("report", "one", "--out", ".", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "megafork: --out is '.', a folder: give the page's file, such as 'report.html'\n"
    wrong = megafork("report", "one", "three", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "megafork: RUN is 'three': it has no metrics.jsonl; give a run folder such as runs/quickstart\n"


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_it_without_errors(tmp_path: Path) -> None:
    page = write_comparison(hostile_runs(tmp_path))
    shown, written = shown_by_a_browser(page, tmp_path / "profile"), Elements(page.read_text())
    assert sum(tag == "svg" for tag, _ in shown.found) == sum(tag == "svg" for tag, _ in written.found) > 3
