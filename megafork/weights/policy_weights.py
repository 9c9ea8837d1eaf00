"""Loads and exports a policy's weights: each rank reads its slices of a Hugging Face folder; exports use Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.shape import Shape, unfused
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.mapping import LAYERS, Parameter, full_shape, parameters, pieces, shard_shape, shards_of, stage_of

_EXPERTS = "mlp.experts.local_experts."


def global_name(chunk: Policy, name: str) -> str:
    """A parameter's name in plain layers, with layer and expert numbered within the whole model instead of within this stage or rank."""
    if not name.startswith(f"{LAYERS}."):
        return name
    head, _, rest = name.removeprefix(f"{LAYERS}.").partition(".")
    layer, rest = chunk.decoder.layers[int(head)], unfused(rest)
    if rest.startswith(_EXPERTS):
        expert, _, inner = rest.removeprefix(_EXPERTS).partition(".")
        rest = f"{_EXPERTS}{layer.mlp.local_expert_indices[int(expert)]}.{inner}"
    return f"{LAYERS}.{layer.layer_number - 1}.{rest}"


def local_parameters(chunks: list[Policy]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name, whether its layers are fused or plain."""
    return {global_name(chunk, name): parameter for chunk in chunks for name, parameter in chunk.named_parameters()}


def load_policy(chunks: list[Policy], source: HuggingFaceWeights, shape: Shape, mesh: Mesh) -> None:
    """Fill this rank's parameters from a Hugging Face folder, reading only the slices that it needs. No communication.

    Call `source.check(shape)` first. Padding rows of the vocabulary become zero.
    """
    wanted = {parameter.name: parameter for parameter in parameters(shape)}
    if shape.tied:
        head = Parameter(shape.family, shape.family.tied_head)
        wanted[head.name] = head
    with torch.no_grad():
        for name, local in local_parameters(chunks).items():
            parameter = wanted[name]
            shards = shards_of(parameter, shape, mesh.layout)
            shard = shards.of(mesh.rank_in_stage)
            assert shard is not None and tuple(local.shape) == shard_shape(parameter, shape, shards.parts), f"{name}: {tuple(local.shape)}"
            local.zero_()
            for piece in pieces(parameter, shape, shards.parts, shard):
                tensor = source.read(piece.name, piece.rows, piece.columns)
                local[piece.at : piece.at + tensor.size(0)].copy_(tensor)


def export_policy(chunks: list[Policy], shape: Shape, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole model under Hugging Face names, parameter by parameter, each tensor whole on every rank. All ranks must iterate
    together.

    Peak extra memory is twice the full size of one parameter. The tensors are fresh: the receiver may keep them.
    """
    local = local_parameters(chunks)
    for parameter in parameters(shape):
        shards = _gather(parameter, local.get(parameter.name), shape, mesh, next(iter(local.values())))
        full: dict[str, Tensor] = {}
        for rank, shard in enumerate(shards):
            for piece in pieces(parameter, shape, len(shards), rank):
                part = shard[piece.at : piece.at + piece.rows[1] - piece.rows[0]]
                target = full.get(piece.name)
                if target is None:
                    target = full[piece.name] = part.new_empty(full_shape(piece.name, shape))
                rows = target[piece.rows[0] : piece.rows[1]]
                (rows if piece.columns is None else rows[:, piece.columns[0] : piece.columns[1]]).copy_(part)
        yield from full.items()


class WholeWeights:
    """Runs `export_policy` at each pass, for receivers outside the training ranks. Every rank constructs one, and all iterate together."""

    def __init__(self, chunks: list[Policy], shape: Shape, mesh: Mesh) -> None:
        self._export = partial(export_policy, chunks, shape, mesh)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._export()


def _gather(parameter: Parameter, local: Tensor | None, shape: Shape, mesh: Mesh, like: Tensor) -> list[Tensor]:
    """Every shard of a parameter, on every rank of the replica."""
    spread, stage = shards_of(parameter, shape, mesh.layout), stage_of(parameter, shape, mesh.layout)
    shards = [like.new_empty(shard_shape(parameter, shape, spread.parts)) for _ in range(spread.parts)]
    if mesh.pp_rank == stage:
        group = mesh.sharing_group(experts=parameter.expert is not None)
        if spread.parts == group.size():
            assert local is not None
            dist.all_gather(shards, local.detach().contiguous(), group=group)
        else:  # the group's other ranks hold other experts
            for number, shard in enumerate(shards):
                if local is not None and number == spread.of(mesh.rank_in_stage):
                    shard.copy_(local.detach())
                dist.broadcast(shard, dist.get_global_rank(group, spread.first + number), group=group)
    if mesh.layout.pp > 1:
        group = mpu.get_pipeline_model_parallel_group()
        source = dist.get_global_rank(group, stage)
        for shard in shards:
            dist.broadcast(shard, source, group=group)
    return shards
