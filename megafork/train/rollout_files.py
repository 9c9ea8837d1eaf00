"""A run's files about individual responses: a parquet file of each step's roll-outs (prompt, response, reward, and per token the entropy,
the log-prob and whether it is a fork), and the accuracy on each held-out prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from megafork.data.prompts import Prompt, problems
from megafork.files import whole
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch, Response
from megafork.run_folder import evaluation_file
from megafork.train.inputs import Inputs
from megafork.train.writer import Writer

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt_index", pa.int64()),
        ("prompt", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("reward", pa.float32()),
        ("accuracy", pa.float32()),
        ("advantage", pa.float32()),
        ("truncated", pa.bool_()),
        ("tokens", pa.list_(pa.int32())),
        ("pieces", pa.list_(pa.string())),
        ("entropies", pa.list_(pa.float32())),
        ("log_probs", pa.list_(pa.float32())),
        ("mask", pa.list_(pa.bool_())),
        ("versions", pa.list_(pa.int32())),
    ]
)


class _Columns(NamedTuple):
    response: Response
    entropy: Tensor
    log_prob: Tensor
    mask: Tensor


class RolloutFiles:
    """Writes rollouts/step_000012.parquet in the background. Every rank creates one, and all ranks call each method together."""

    def __init__(self, recipe: Recipe, inputs: Inputs, mesh: Mesh, writer: Writer) -> None:
        self._every = recipe.log.rollouts_every
        self._folder = recipe.run_folder / "rollouts"
        self._inputs = inputs
        self._mesh = mesh
        self._writer = writer
        sends = mesh.is_last_stage and mesh.tp_rank == 0 and mesh.cp_rank == 0
        every: list[bool] = [False] * mesh.world
        dist.all_gather_object(every, sends)
        self._senders = [rank for rank, sends in enumerate(every) if sends]
        self._group = dist.new_group(backend="gloo")  # its own: a thread uses it during training

    def write(self, step: int, micros: list[MicroBatch]) -> None:
        """Write the step's responses from the ranks that trained on them, if this step's are wanted."""
        if not self._every or step % self._every:
            return
        columns = list(_columns(micros, self._mesh)) if self._mesh.is_last_stage else []
        held = columns if self._mesh.rank in self._senders else []
        self._writer.begin(f"{self._folder}: step {step}", partial(self._write, step, held))

    def settle(self) -> None:
        """Wait until everything is written."""
        self._writer.settle()

    def _write(self, step: int, held: list[_Columns]) -> None:
        """Rank 0 writes, and receives one DP rank's rows at a time, so it never holds more than two shares of them. The write is atomic."""
        rows = _rows(step, held, self._inputs)
        with ExitStack() as opened:
            writer = None
            if self._mesh.is_rank_zero:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = opened.enter_context(whole(self._folder / f"step_{step:06d}.parquet"))
                writer = opened.enter_context(pq.ParquetWriter(file, SCHEMA, compression="zstd"))
            for rank in self._senders:
                part = self._receive(rows, rank)
                if writer is not None and part:
                    writer.write_table(pa.Table.from_pylist(part, schema=SCHEMA))

    def _receive(self, rows: list[dict[str, Any]], source: int) -> list[dict[str, Any]]:
        """Receive rank `source`'s rows on rank 0."""
        if source == 0 or self._mesh.rank not in (0, source):
            return rows if self._mesh.is_rank_zero else []
        box: list[Any] = [rows]
        if self._mesh.rank == source:
            dist.send_object_list(box, dst=0, group=self._group)
            return []
        dist.recv_object_list(box, src=source, group=self._group)
        return box[0]


def write_evaluation(run_folder: Path, step: int, accuracies: Sequence[float], held_out: Sequence[Prompt]) -> None:
    """Write evaluations/step_000012.json, {"step", "accuracies", "problems"}: the accuracies in the order of the held-out prompts, and the
    prompts' fingerprint (`prompts.problems`). The write is atomic. Rank 0 only."""
    file = evaluation_file(run_folder, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps({"step": step, "accuracies": list(accuracies), "problems": problems(held_out)}) + "\n")


def _columns(micros: list[MicroBatch], mesh: Mesh) -> Iterator[_Columns]:
    """Each response with its entropies, log-probs and mask, in host memory. Every CP rank must call."""
    for micro in micros:
        columns = [micro.by_response(values, mesh.cp_group) for values in (micro.entropy, micro.old_log_prob, micro.mask)]
        yield from itertools.starmap(_Columns, zip(micro.responses, *columns, strict=True))


def _rows(step: int, held: list[_Columns], inputs: Inputs) -> list[dict[str, Any]]:
    rows = []
    for response, entropy, log_prob, mask in held:
        tokens = response.tokens.tolist()
        rows.append(
            {
                "step": step,
                "prompt_index": response.prompt,
                "prompt": inputs.train[response.prompt].text,
                "sample": response.sample,
                "response": inputs.tokenizer.decode(tokens),
                "reward": response.reward,
                "accuracy": response.accuracy,
                "advantage": response.advantage,
                "truncated": response.truncated,
                "tokens": tokens,
                "pieces": inputs.tokenizer.pieces(tokens),
                "entropies": entropy.tolist(),
                "log_probs": log_prob.tolist(),
                "mask": mask.to(torch.bool).tolist(),
                "versions": response.versions.tolist(),
            }
        )
    return sorted(rows, key=lambda row: (row["prompt_index"], row["sample"]))
