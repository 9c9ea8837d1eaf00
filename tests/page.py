"""A run folder with made-up numbers, its report, and functions that read values back from the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml

from megafork.report.report import write_report
from megafork.train.rollout_files import SCHEMA

HOSTILE = [
    '<script>alert("x")</script>',
    '"><img src=http://evil.example/a.png onerror=alert(1)>',
    "</title></style>",
    "\u202egnp",
    "a\x00b",
    "&amp;",
]


def response(prompt: int, sample: int, accuracy: float, pieces: list[str], entropies: list[float], *, tau: float = 0.5) -> dict[str, Any]:
    return {
        "step": 3,
        "prompt_index": prompt,
        "sample": sample,
        "prompt": f"prompt {prompt}",
        "response": "".join(pieces),
        "reward": accuracy,
        "accuracy": accuracy,
        "advantage": 1.0 if accuracy else -1.0,
        "truncated": False,
        "tokens": list(range(len(pieces))),
        "pieces": pieces,
        "entropies": entropies,
        "log_probs": [-entropy for entropy in entropies],
        "mask": [entropy >= tau for entropy in entropies],
    }


ROWS = [
    response(7, 0, 0.0, ["2", " +", " 2", " =", "\n", "5"], [1.25, 0.75, 0.5, 0.001, 0.02, 0.3]),
    response(7, 1, 1.0, ["2", " +", " 2", " =", " 4"], [1.2, 0.7, 0.4, 0.004, 0.03]),
    response(8, 0, 1.0, ["all", "right"], [0.0, 0.04]),
    response(8, 1, 1.0, ["all", "right"], [0.009, 2.0]),
]


METRICS: list[dict[str, Any]] = [
    {"step": 0, "eval/accuracy": 0.25},
    {
        "step": 1,
        "accuracy/mean": 0.30,
        "entropy/mean": 0.50,
        "entropy/p80": 0.9,
        "entropy/forks": 1.5,
        "forks/tau": 0.8,
        "time/rollout": 2.0,
    },
    {
        "step": 2,
        "accuracy/mean": None,
        "entropy/mean": 0.45,
        "entropy/p80": 0.8,
        "entropy/forks": 1.4,
        "forks/tau": 0.7,
        "time/rollout": 1.0,
    },
    {
        "step": 3,
        "accuracy/mean": 0.62,
        "entropy/mean": 0.40,
        "entropy/p80": 0.7,
        "entropy/forks": 1.3,
        "forks/tau": 0.5,
        "time/rollout": 1.5,
        "time/update": 0.5,
        "time/step": 2.25,
        "eval/accuracy": 0.75,
    },
]


RECIPE = {
    "run": {"name": "sums"},
    "model": {"path": "models/tiny"},
    "train": {"steps": 3},
    "forks": {"select": "top", "top_entropy_quantile": 0.2},
}


def report(
    folder: Path,
    metrics: list[dict[str, Any]] = METRICS,
    rows: list[dict[str, Any]] | None = ROWS,
    recipe: dict[str, Any] | None = RECIPE,
    *,
    group: int = 2,
) -> str:
    """Write a run folder, then the report; returns its HTML."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if rows is not None:
        parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "rollouts" / "step_000003.parquet", row_group_size=group)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob("*.writing"))
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All elements as (tag, attributes), and the text inside each `<p class="tokens">`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.responses: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "p" and dict(attrs).get("class") == "tokens":
            self._inside = True
            self.responses.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.responses[-1] += data

    def tokens(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.found if tag == "span" and "title" in attributes]


def drawing(html: str, label: str) -> ElementTree.Element:
    """The figure whose accessible label begins with `label`."""
    return next(ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.S) if f'aria-label="{label}' in svg)


def read_axis(svg: ElementTree.Element, kind: str, coordinate: str) -> np.ndarray:
    """(position, value) of an axis's labels, percentages and thousands as numbers."""
    labels = [(text.get(coordinate), (text.text or "")) for text in svg.iter("text") if text.get("class") == kind]
    units = {"%": 0.01, "k": 1e3}
    return np.array([(float(at or 0), float(text.rstrip("%k")) * units.get(text[-1], 1.0)) for at, text in labels])


def read_curve(svg: ElementTree.Element, name: str) -> list[list[tuple[float, float]]]:
    """The segments of a curve in data coordinates, by the labels of the axes alone."""
    x, y = read_axis(svg, "x", "x"), read_axis(svg, "y", "y")
    to_x, to_y = np.polyfit(x[:, 0], x[:, 1], 1), np.polyfit(y[:, 0], y[:, 1], 1)
    segments = []
    for line in svg.iter("polyline"):
        if line.get("data-series") == name:
            points = [[float(part) for part in pair.split(",")] for pair in (line.get("points") or "").split()]
            segments.append([(float(np.polyval(to_x, px)), float(np.polyval(to_y, py))) for px, py in points])
    return segments


def assert_points(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
    np.testing.assert_allclose(found, wanted, atol=0.012)  # positions are written to a tenth of a unit


needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed: apt-get install chromium")


def shown_by_a_browser(page: Path, profile: Path) -> Elements:
    """The page as Chromium has understood it; a blocked load, a script or an error on its console fails."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [
        "chromium",
        *flags.split(),
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--dump-dom",
        page.as_uri(),
    ]
    browser = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in browser.stderr.splitlines() if "CONSOLE" in line] == []
    return Elements(browser.stdout)
