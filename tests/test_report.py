"""The report: what it draws equals what the run wrote, whatever is missing and whatever the texts contain."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from page import (
    HOSTILE,
    METRICS,
    RECIPE,
    ROWS,
    Elements,
    assert_points,
    drawing,
    needs_chromium,
    read_axis,
    read_curve,
    report,
    response,
    shown_by_a_browser,
)

from megafork.recipe import RecipeError
from megafork.report.entropy import entropy_histogram, entropy_summary
from megafork.report.figures import Series, line_chart, nice_ticks
from megafork.report.report import write_report
from megafork.report.responses import MOST_TOKENS
from megafork.run_folder import open_rollouts, read_entropies, read_rows


def count_of(text: str, what: str) -> int:
    return int(re.findall(rf"([\d,]+) {what}", text)[0].replace(",", ""))


def test_curves_lie_where_the_axes_say_the_metrics_are(tmp_path: Path) -> None:
    html = report(tmp_path / "run")
    accuracy, entropy = drawing(html, "Accuracy"), drawing(html, "Entropy")
    assert [len(segment) for segment in read_curve(accuracy, "training")] == [1, 1], "a null breaks the curve"
    assert_points([point for segment in read_curve(accuracy, "training") for point in segment], [(1, 0.30), (3, 0.62)])
    assert_points(read_curve(accuracy, "held out")[0], [(0, 0.25), (3, 0.75)])
    for name, key in (("all", "entropy/mean"), ("p80", "entropy/p80"), ("forks", "entropy/forks")):
        assert_points(read_curve(entropy, name)[0], [(row["step"], row[key]) for row in METRICS[1:]])
    assert_points(read_curve(drawing(html, "Threshold"), "τ")[0], [(row["step"], row["forks/tau"]) for row in METRICS[1:]])
    titles = [title.text for title in accuracy.iter("title")]
    assert "step 3\ntraining 62.0%\nheld out 75.0%" in titles


def test_header_gives_before_and_after_and_what_was_trained(tmp_path: Path) -> None:
    html = report(tmp_path / "run")
    text = re.sub(r"<[^>]+>", " ", html)
    assert re.search(r"held-out accuracy\s+25\.0%\s+→\s+75\.0%\s+step 0 → step 3", text)
    assert "models/tiny trained for 3 steps on the 20% of response tokens with the highest entropy." in text


def test_histogram_counts_every_token_and_parts_them_at_tau(tmp_path: Path) -> None:
    html = report(tmp_path / "run")
    svg = drawing(html, "Histogram")
    words = [title.text or "" for title in svg.iter("title")]
    entropies = [entropy for row in ROWS for entropy in row["entropies"]]
    assert sum(count_of(text, "tokens") for text in words) == len(entropies)
    assert sum(count_of(text, "selected") for text in words) == sum(1 for entropy in entropies if entropy >= 0.5)
    x, y = read_axis(svg, "x", "x"), read_axis(svg, "y", "y")
    tau = next(line for line in svg.iter("line") if line.get("class") == "tau")
    assert np.polyval(np.polyfit(x[:, 0], x[:, 1], 1), float(tau.get("x1") or 0)) == pytest.approx(0.5, abs=0.01)
    to_count = np.polyfit(y[:, 0], np.log10(y[:, 1]), 1)
    for group in svg.iter("g"):
        rect, title = group.find("rect"), group.findtext("title") or ""
        assert rect is not None
        height = 10 ** np.polyval(to_count, float(rect.get("y") or 0))
        assert height == pytest.approx(count_of(title, "tokens"), rel=0.02)
        assert float(re.split(" to ", title)[0]) >= 0.5 or "0 selected" in title
    shares = dict(re.findall(r"<span>([^<]+)</span><b>([\d.]+%)</b>", html))
    low, middle = sum(e < 0.01 for e in entropies), sum(0.01 <= e < 0.05 for e in entropies)
    assert shares["under 0.01 nats"] == f"{low / len(entropies):.1%}"
    assert shares["0.01 to 0.05 nats"] == f"{middle / len(entropies):.1%}"


def test_phase_bars_stack_to_the_step(tmp_path: Path) -> None:
    svg = drawing(report(tmp_path / "run"), "Time of each step")
    y = read_axis(svg, "y", "y")
    seconds = abs(float(np.polyfit(y[:, 0], y[:, 1], 1)[0]))
    last = [group for group in svg.iter("g") if group.get("class") == "bar"][-1]
    heights = [float(rect.get("height") or 0) * seconds for rect in last.iter("rect")]
    np.testing.assert_allclose(heights, [1.5, 0.5, 0.25], atol=0.01)  # rollout, update, and what no phase counts
    assert last.findtext("title") == "step 3\nrollout 1.5s\nupdate 0.50s\nother 0.25s"


def test_responses_show_each_token_with_its_numbers_and_right_beside_wrong(tmp_path: Path) -> None:
    elements = Elements(report(tmp_path / "run"))
    right, wrong = ROWS[1], ROWS[0]
    assert elements.responses == [right["response"], wrong["response"]], "only the prompt with both, right first"
    shown = elements.tokens()
    for attributes, piece, entropy, chosen in zip(
        shown, right["pieces"] + wrong["pieces"], right["entropies"] + wrong["entropies"], right["mask"] + wrong["mask"], strict=True
    ):
        facts = attributes["title"].split("\n")
        assert facts[0] == repr(piece)
        assert float(facts[1].split()[1]) == pytest.approx(entropy, rel=0.01)
        assert float(facts[2].split()[1]) == pytest.approx(math.exp(-entropy), rel=0.01)
        assert facts[4] == ("selected" if chosen else "not selected")
        assert ("fork" in attributes["class"].split()) is chosen
        assert attributes["tabindex"] == ("0" if chosen else "-1")
    assert shown[0]["title"].split("\n")[3] == "advantage +1.00"
    levels = [int(attributes["class"][1]) for attributes in shown[:5]]
    assert levels == [4, 3, 2, 0, 0], "1.2, 0.7, 0.4, 0.004 and 0.03 nats"


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    nasty = "".join(HOSTILE)
    rows = [{**response(1, s, float(s), HOSTILE, [1.0] * len(HOSTILE)), "prompt": nasty} for s in (0, 1)]
    metrics = [{"step": 3, "accuracy/mean": 0.5, f"x/{nasty}": 1.0}]
    recipe = {
        "run": {"name": nasty.replace("\x00", "")},
        "model": {"path": HOSTILE[0]},
        nasty.replace("\x00", ""): {HOSTILE[1]: HOSTILE[0]},
    }
    html = report(tmp_path / "run", metrics, rows, recipe)
    elements = Elements(html)
    assert not {tag for tag, _ in elements.found} & {"script", "img", "iframe", "object", "link", "form"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert "\u202e" not in html and "\x00" not in html
    assert elements.responses[0] == nasty.replace("\u202e", "\ufffd").replace("\x00", "\u2400")


def test_report_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    html = report(tmp_path / "run")
    elements = Elements(html)
    references = [v for _, attributes in elements.found for name, v in attributes.items() if name in ("src", "href", "srcset", "data")]
    assert references and all(reference.startswith("#") for reference in references)
    targets = {attributes.get("id") for _, attributes in elements.found}
    assert all(reference[1:] in targets for reference in references)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)
    assert "default-src 'none'" in html


def test_parts_that_a_run_has_not_written_are_left_out(tmp_path: Path) -> None:
    bare = report(tmp_path / "bare", [{"step": 1, "accuracy/mean": 0.5}], None, None)
    assert "<h1>bare</h1>" in bare
    assert re.findall(r"<h2>(.*?)</h2>", bare) == ["Learning", "Numbers"]
    assert len(re.findall("<circle class=", drawing_text(bare, "Accuracy"))) >= 1, "a single step is drawn as a dot"
    supervised = report(tmp_path / "sft", [{"step": step, "loss/sft": 2.0 / step, "lr": 1e-3} for step in (1, 2, 3)], None)
    assert "trained for 3 steps on target texts." in supervised
    assert_points(read_curve(drawing(supervised, "Supervised loss"), "loss")[0], [(1, 2.0), (2, 1.0), (3, 2 / 3)])
    nothing = report(tmp_path / "null", [{"step": 1, "accuracy/mean": None, "entropy/mean": None}], None)
    assert "<svg" not in nothing
    empty = report(tmp_path / "empty", METRICS, [])
    assert "Responses" not in empty and "Where the forks are" not in empty
    all_right = Elements(report(tmp_path / "right", METRICS, ROWS[2:]))
    assert all_right.responses == ["allright", "allright"]


def drawing_text(html: str, label: str) -> str:
    return ElementTree.tostring(drawing(html, label), encoding="unicode")


def test_rollouts_left_by_a_killed_run_are_not_shown(tmp_path: Path) -> None:
    html = report(tmp_path / "run", METRICS[:3])
    assert "Responses" not in html and "Where the forks are" not in html


def test_table_holds_first_last_lowest_and_highest(tmp_path: Path) -> None:
    html = report(tmp_path / "run")
    row = re.search(r'<th scope="row">time/rollout</th>(.*?)</tr>', html)
    assert row and re.findall("<td>(.*?)</td>", row[1]) == ["2.00", "1.50", "1.00", "2.00"]


def test_warnings_name_an_unfinished_run_and_failed_verdicts(tmp_path: Path) -> None:
    html = report(tmp_path / "run", [*METRICS, {"step": 4, "reward/errors": 2}], ROWS, {**RECIPE, "train": {"steps": 9}})
    assert "The run has written 4 of its 9 steps." in html
    assert "each scored 0: 2." in html


def test_damaged_files_are_answered_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'.*metrics\.jsonl' does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="has no complete line"):
        report(tmp_path / "none", [])
    report(tmp_path / "cut")
    rollouts = tmp_path / "cut" / "rollouts" / "step_000003.parquet"
    rollouts.write_bytes(rollouts.read_bytes()[:-20])
    with pytest.raises(RecipeError, match=r"'.*step_000003\.parquet' is not a complete parquet file"):
        write_report(tmp_path / "cut")


def test_a_page_that_cannot_be_written_is_answered_in_one_line(tmp_path: Path) -> None:
    report(tmp_path)
    with pytest.raises(RecipeError, match=r"^the page '.*/metrics.jsonl/x.html' can't be written \(.*\): give another file as --out$"):
        write_report(tmp_path, tmp_path / "metrics.jsonl" / "x.html")


def test_size_is_bounded_and_spikes_survive(tmp_path: Path) -> None:
    metrics = [{"step": step, "accuracy/mean": 0.5, "grad_norm": 100.0 if step == 12_345 else 1.0} for step in range(1, 20_001)]
    long = ["word "] * 20_000
    rows = [response(1, s, float(s), long, [0.1] * len(long)) for s in (0, 1)]
    html = report(tmp_path / "run", metrics, rows)
    assert len(html) < 1_000_000
    assert len(Elements(html).tokens()) == 2 * MOST_TOKENS
    assert f"{20_000 - MOST_TOKENS:,} more tokens" in html
    points = read_curve(drawing(html, "Gradient norm"), "norm")[0]
    assert len(points) <= 400
    assert max(points, key=lambda point: point[1]) == pytest.approx((12_345, 100.0), rel=0.01)


def test_rollouts_are_read_by_row_group(tmp_path: Path) -> None:
    report(tmp_path / "run", group=2)
    with open_rollouts(tmp_path / "run" / "rollouts" / "step_000003.parquet") as file:
        assert file.num_row_groups == 2
        assert [row["response"] for row in read_rows(file, [3, 0])] == [ROWS[3]["response"], ROWS[0]["response"]]
        entropies, mask = read_entropies(file, at_most=7)
        wanted = (ROWS[0]["entropies"] + ROWS[1]["entropies"])[:7]
        np.testing.assert_allclose(entropies, wanted, rtol=1e-6)
        assert mask.tolist() == [entropy >= 0.5 for entropy in wanted]


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=60))
@example([0.01, 0.05, 0.0])
def test_summary_equals_the_definitions(values: list[float]) -> None:
    summary = entropy_summary(values)
    ordered = sorted(values)

    def percentile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    assert summary["tokens"] == len(values)
    assert summary["mean"] == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
    for name, q in (("p50", 0.5), ("p80", 0.8), ("p95", 0.95)):
        assert summary[name] == pytest.approx(percentile(q), abs=1e-9)
    assert summary["under_0.01"] == sum(v < 0.01 for v in values) / len(values)
    assert summary["under_0.05"] == sum(v < 0.05 for v in values) / len(values)


def test_summary_of_nothing_and_of_nan() -> None:
    assert entropy_summary([]) == {"tokens": 0, **dict.fromkeys(("mean", "p50", "p80", "p95", "under_0.01", "under_0.05"))}
    with pytest.raises(ValueError, match="entropy 1 of 3 is NaN"):
        entropy_summary([0.1, float("nan"), 0.2])


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=60), st.one_of(st.none(), st.floats(0, 12, width=32)))
@example([0.1, 0.3, 0.7, 2.9], 0.7)
def test_histogram_loses_no_token_and_parts_them_at_tau(values: list[float], tau: float | None) -> None:
    entropies = np.array(values, np.float32)
    mask = entropies >= (tau or 0)
    bins = entropy_histogram(entropies, mask, tau=tau)
    assert sum(bins.counts) == len(values) and sum(bins.selected) == int(mask.sum())
    for low, high, count, chosen in zip(bins.edges, bins.edges[1:], bins.counts, bins.selected, strict=False):
        if tau is None or bins.edges[1] < tau < bins.edges[-1]:
            assert chosen in (0, count), f"the bin from {low} to {high} mixes both sides of {tau}"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_evenly(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    gap = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * gap and ticks[-1] >= high - 1e-6 * gap
    assert 2 <= len(ticks) <= 8
    np.testing.assert_allclose(np.diff(ticks), gap, rtol=1e-6)


def test_names_of_meeting_curves_do_not_overlap() -> None:
    svg = ElementTree.fromstring(line_chart("x", [1, 2], [Series(name, [0.0, 0.0], "blue") for name in "abcd"]))
    places = sorted(float(text.get("y") or 0) for text in svg.iter("text") if (text.get("class") or "").startswith("name"))
    assert min(np.diff(places)) >= 12.9 and places[0] >= 0


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_it_without_errors(tmp_path: Path) -> None:
    report(tmp_path / "run", rows=[{**ROWS[0], "pieces": [*HOSTILE[:5], "x"]}, *ROWS[1:]])
    page = tmp_path / "run" / "report.html"
    shown, written = shown_by_a_browser(page, tmp_path / "profile"), Elements(page.read_text())
    assert shown.responses == written.responses
    assert sum(tag == "svg" for tag, _ in shown.found) == sum(tag == "svg" for tag, _ in written.found) > 3
