"""Entropies of the same responses under each model, by Megatron in the given layout, one model in memory at a time. Runs on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.analyze.inputs import AnalysisInputs
from megafork.analyze.responses import is_current, read_responses, write_entropies, write_responses
from megafork.convert.named import AS_OPTIONS, NamedModel
from megafork.model.build import PolicyConfig, build_policy
from megafork.model.policy import Policy
from megafork.model.schedule import run_micro_batches
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Precision, calling
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.packing import packer, placement
from megafork.shape import read_shape
from megafork.weights.checkpoint import load_weights
from megafork.weights.huggingface import HuggingFaceWeights, is_finite, not_finite
from megafork.weights.policy_weights import load_policy, local_parameters

Rows = list[dict[str, Any]]


def unscored(inputs: AnalysisInputs) -> list[str]:
    """Labels of the models whose entropies are still missing."""
    return [label for label in inputs.models if not is_current(inputs.entropies(label), inputs.identity_of(label))]


def score_responses(inputs: AnalysisInputs, device: torch.device) -> None:
    """Write the missing files of responses and entropies. Every rank of the world must call."""
    mesh = build_mesh(inputs.layout, seed=inputs.options.seed, device=device)
    if mesh.is_rank_zero and not is_current(inputs.responses, inputs.identity):
        write_responses(inputs)
    left: list[Any] = [unscored(inputs) if mesh.is_rank_zero else None]
    dist.broadcast_object_list(left, src=0)  # also makes every rank wait for the responses
    precision = Precision.model_validate({"dtype": inputs.job.engine.dtype})
    chunks = build_policy(read_shape(inputs.author.folder), PolicyConfig(precision), mesh)
    for label in left[0]:
        _load(inputs.models[label], chunks, mesh)
        groups = (_score_group(rows, chunks, inputs, mesh) for rows in read_responses(inputs, ("prompt_tokens", "tokens")))
        if mesh.is_rank_zero:
            write_entropies(inputs, label, groups)
        else:
            for _ in groups:
                pass


def _load(model: NamedModel, chunks: list[Policy], mesh: Mesh) -> None:
    with calling(AS_OPTIONS):
        if model.checkpoint is None:
            load_policy(chunks, HuggingFaceWeights(model.folder), read_shape(model.folder), mesh)
            return
        load_weights(model.checkpoint, chunks, mesh)
        for name, parameter in local_parameters(chunks).items():
            if not is_finite(parameter.detach()):
                raise not_finite(model.checkpoint, name)


def _score_group(rows: Rows, chunks: list[Policy], inputs: AnalysisInputs, mesh: Mesh) -> Rows:
    """{"entropies", "log_probs"} (fp32) of each row, on every rank. Every rank must call."""
    lengths = [len(row["prompt_tokens"]) + len(row["tokens"]) - 1 for row in rows]
    placed = placement(lengths, inputs.layout.padded(inputs.job.engine.longest_sequence), mesh)[mesh.dp_rank]
    packed = packer(mesh, whole=1, temperature=inputs.options.temperature)
    micros = [packed([_response(n, rows[n]) for n in members]) for members in placed]

    def keep(micro: MicroBatch, output: tuple[Tensor, Tensor], non_loss_data: bool) -> None:
        micro.old_log_prob, micro.entropy = output

    with torch.no_grad():
        run_micro_batches(chunks, micros, keep, cp=mesh.layout.cp, forward_only=True, everywhere=True)
    mine = dict(_by_row(micros, mesh)) if mesh.is_last_stage else {}
    every: list[dict[int, dict[str, Any]]] = [{} for _ in range(mesh.world)]
    dist.all_gather_object(every, mine if mesh.tp_rank == 0 and mesh.cp_rank == 0 else {})
    found = {n: row for part in every for n, row in part.items()}
    return [found[n] for n in range(len(rows))]


def _response(number: int, row: dict[str, Any]) -> Response:
    prompt, tokens = (torch.tensor(row[name], dtype=torch.int32) for name in ("prompt_tokens", "tokens"))
    return Response(number, 0, 0, prompt, tokens, torch.zeros(len(tokens)), truncated=False)


def _by_row(micros: list[MicroBatch], mesh: Mesh) -> Iterator[tuple[int, dict[str, Any]]]:
    for micro in micros:
        columns = [micro.by_response(values, mesh.cp_group) for values in (micro.entropy, micro.old_log_prob)]
        for response, entropy, log_prob in zip(micro.responses, *columns, strict=True):
            yield response.group, {"entropies": entropy.clamp(min=0).numpy(), "log_probs": log_prob.numpy()}
