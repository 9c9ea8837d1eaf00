"""Statistics of an analysis, from its parquet files, read as streams in bounded memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megafork.analyze.inputs import AnalysisInputs
from megafork.analyze.overlap import ChangeByBin, Overlap
from megafork.analyze.responses import read_lists
from megafork.analyze.sorted_stream import SortedStream, kept
from megafork.files import whole
from megafork.report.entropy import histogram_edges

Results = dict[str, Any]
CURVE = (0, 5, 25, 50, 75, 80, 85, 90, 95, 100)
"""Percentiles compared between checkpoints."""
_CERTAIN = 0.01
_RANKED = 100
_BINS = 20


def analyse(inputs: AnalysisInputs) -> Results:
    """Write `analysis.json` and `tokens.parquet` from the files that `score` has written; returns the contents of the former.

    {options..., "digests", "labels", "responses", "tokens", "entropies": {label: `_distribution`}, "vocabulary": `_vocabulary`,
    "overlap": {"pooled", "per_response": [M][M] in the order of the labels}, "change": {"base", "edges", "counts", "means": {label:
    [bins]}}}. Entropies in nats at `temperature`.
    """
    labels = list(inputs.models)
    streams = {label: SortedStream(_Values(inputs.entropies(label))) for label in labels}
    thresholds = {label: stream.threshold(inputs.options.rho) for label, stream in streams.items()}
    distributions = {label: _distribution(streams[label], thresholds[label], inputs, label) for label in labels}
    overlap = Overlap(list(thresholds.values()), inputs.options.rho)
    base = streams[labels[0]]
    change = ChangeByBin(list(base.at([kept(n / _BINS, base.total) for n in range(1, _BINS)])), len(labels))
    for entropies, ends in _aligned(inputs, labels):
        change.add(entropies[0], entropies)
        for response in np.split(entropies, ends[:-1], axis=1):
            overlap.add(response)
    results = {
        **dataclasses.asdict(inputs.options),
        "digests": inputs.digests,
        "labels": labels,
        "responses": overlap.responses,
        "tokens": base.total,
        "entropies": distributions,
        "vocabulary": _vocabulary(inputs, labels[-1]),
        "overlap": {"pooled": overlap.pooled.tolist(), "per_response": overlap.per_response.tolist()},
        "change": {
            "base": labels[0],
            "edges": change.edges.tolist(),
            "counts": change.counts.tolist(),
            "means": dict(zip(labels, change.means(), strict=True)),
        },
    }
    with whole(inputs.folder / "analysis.json") as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
    return results


class _Values:
    """Reads a file's entropies afresh on each call."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> Iterator[np.ndarray]:
        return (values for values, _ in read_lists(self._file, "entropies"))


def _aligned(inputs: AnalysisInputs, labels: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each row group, the entropies of its tokens under each model, fp32 [M, n], and the end of each response."""
    for parts in zip(*(read_lists(inputs.entropies(label), "entropies") for label in labels), strict=True):
        yield np.stack([values for values, _ in parts]), parts[0][1]


def _distribution(stream: SortedStream, threshold: float, inputs: AnalysisInputs, label: str) -> dict[str, Any]:
    """{"mean", "share_below_0.01", "percentiles" (of 0, 1, ... 100), "top_share" (of the sum of all entropies, by the top 0, 1, ... 100%),
    "threshold" (the smallest entropy among the top rho), "histogram": {"edges", "counts", "selected"}}."""
    percentiles = stream.percentiles(range(101))
    sums = stream.sums_of_largest([kept(share / 100, stream.total) if share else 0 for share in range(101)])
    edges = histogram_edges(percentiles[-1], tau=threshold)
    counts, selected, certain = np.zeros(len(edges) - 1, np.int64), np.zeros(len(edges) - 1, np.int64), 0
    for values in _Values(inputs.entropies(label))():
        counts += np.histogram(values, edges)[0]
        selected += np.histogram(values[values >= np.float32(threshold)], edges)[0]
        certain += int((values < _CERTAIN).sum())
    return {
        "mean": stream.sum / stream.total,
        f"share_below_{_CERTAIN}": certain / stream.total,
        "percentiles": percentiles,
        "top_share": [part / stream.sum if stream.sum else 0.0 for part in sums],
        "threshold": threshold,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist(), "selected": selected.tolist()},
    }


def _vocabulary(inputs: AnalysisInputs, label: str) -> dict[str, Any]:
    """Mean entropy at the positions of each token: {"seen", "frequent", "highest", "lowest"}, the last two with at most 100 of
    {"id", "token", "count", "mean"} among the tokens seen `min_count` times. All tokens seen go to `tokens.parquet`."""
    counts, sums = np.zeros(inputs.vocab, np.int64), np.zeros(inputs.vocab)
    tokens = (values for values, _ in read_lists(inputs.responses, "tokens"))
    for ids, entropies in zip(tokens, _Values(inputs.entropies(label))(), strict=True):
        counts += np.bincount(ids, minlength=inputs.vocab)
        sums += np.bincount(ids, weights=entropies, minlength=inputs.vocab)
    seen = np.flatnonzero(counts)
    means = sums[seen] / counts[seen]
    texts = [inputs.tokenizer.pieces([int(token)])[0] for token in seen]
    table = pa.table({"id": pa.array(seen, pa.int32()), "token": texts, "count": counts[seen], "mean_entropy": means})
    with whole(inputs.folder / "tokens.parquet") as unfinished:
        pq.write_table(table, unfinished)
    frequent = [n for n in np.argsort(-means, kind="stable") if counts[seen[n]] >= inputs.options.min_count]
    rows = [{"id": int(seen[n]), "token": texts[n], "count": int(counts[seen[n]]), "mean": float(means[n])} for n in frequent]
    return {"seen": len(seen), "frequent": len(frequent), "highest": rows[:_RANKED], "lowest": rows[::-1][:_RANKED]}
