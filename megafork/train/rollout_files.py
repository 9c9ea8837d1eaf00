"""A run's files about individual responses: a parquet file of each step's roll-outs (prompt, response, reward, and per token the entropy,
the log-prob and whether it is a fork), and the accuracy on each held-out prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from megafork.data.prompts import Prompt, problems
from megafork.files import whole
from megafork.parallel.mesh import Mesh
from megafork.rl.batch import MicroBatch
from megafork.run_folder import evaluation_file
from megafork.train.inputs import Inputs

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


def write_rollouts(file: Path, step: int, micros: list[MicroBatch], inputs: Inputs, mesh: Mesh) -> None:
    """Write the step's responses from the ranks that trained on them. Every rank must call.

    Rank 0 writes, and receives one DP rank's rows at a time, so it never holds more than two shares of them. The write is atomic.
    """
    rows = _rows(step, micros, inputs, mesh) if mesh.is_last_stage else []
    sender = mesh.is_last_stage and mesh.tp_rank == 0 and mesh.cp_rank == 0
    senders: list[int] = [0] * mesh.world
    dist.all_gather_object(senders, int(sender))
    with ExitStack() as opened:
        writer = None
        if mesh.is_rank_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            writer = opened.enter_context(pq.ParquetWriter(opened.enter_context(whole(file)), SCHEMA, compression="zstd"))
        for rank in (rank for rank, sends in enumerate(senders) if sends):
            part = _receive(rows, rank, mesh)
            if writer is not None and part:
                writer.write_table(pa.Table.from_pylist(part, schema=SCHEMA))


def write_evaluation(run_folder: Path, step: int, accuracies: Sequence[float], held_out: Sequence[Prompt]) -> None:
    """Write evaluations/step_000012.json, {"step", "accuracies", "problems"}: the accuracies in the order of the held-out prompts, and the
    prompts' fingerprint (`prompts.problems`). The write is atomic. Rank 0 only."""
    file = evaluation_file(run_folder, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps({"step": step, "accuracies": list(accuracies), "problems": problems(held_out)}) + "\n")


def _receive(rows: list[dict[str, Any]], source: int, mesh: Mesh) -> list[dict[str, Any]]:
    """Receive rank `source`'s rows on rank 0."""
    if source == 0 or mesh.rank not in (0, source):
        return rows if mesh.is_rank_zero else []
    box: list[Any] = [rows]
    if mesh.rank == source:
        dist.send_object_list(box, dst=0)
        return []
    dist.recv_object_list(box, src=source)
    return box[0]


def _rows(step: int, micros: list[MicroBatch], inputs: Inputs, mesh: Mesh) -> list[dict[str, Any]]:
    rows = []
    for micro in micros:
        columns = [micro.by_response(values, mesh.cp_group) for values in (micro.entropy, micro.old_log_prob, micro.mask)]
        for response, entropy, log_prob, mask in zip(micro.responses, *columns, strict=True):
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
