"""Saving and loading the optimizer's state, spread over all data-parallel ranks.

Megatron's distributed optimizer gives each data-parallel rank a flat slice of all parameters concatenated, whereas a checkpoint that
loads under any layout holds whole parameters. Upstream gathers all of them on every rank, over NCCL. Here one rank writes and reads each
parameter, chosen to balance sizes, and one all-to-all per kind of state, in host memory, brings the slices to it. No rank holds more than
its share, and no GPU memory is used. Files and keys are those of Megatron's `fully_reshardable`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""The fp32 weights and Adam's two moments."""
_FORMAT = "fully_reshardable"
_OF_EXPERTS = "is_expert_parallel"
_OF_THE_RECIPE = ("betas", "eps")
"""Settings that a resumed run may change. Each update sets the others that it may change: learning rate and weight decay."""


def optimizer_content(optimizer: Any, model: dict[str, Any], *, loading: bool) -> Any:
    """The optimizer's state dict for `dist_checkpointing` to save or load. `model`: the model's sharded state. Every rank must call.

    With expert parallelism Megatron has an optimizer for the experts beside the one for all else. They have the same settings and count the
    same steps, which are stored once, so that a checkpoint loads under a layout with one optimizer as well.
    """
    numbered = list(_numbered(optimizer))
    parts = (_sharded(inner, parameters, model, loading) for inner, parameters in numbered)
    shared = numbered[0][0].state_dict()
    return {**shared, "param_state": dict(itertools.chain(*(part.items() for part in parts))), "param_state_sharding_type": _FORMAT}


@torch.no_grad()
def load_optimizer(optimizer: Any, loaded: Any) -> None:
    """Put loaded `optimizer_content` into the optimizer. Every rank must call."""
    shared = {key: value for key, value in loaded.items() if key not in ("param_state", "param_state_sharding_type")}
    for inner, parameters in _numbered(optimizer):
        groups = [_settings(group, shared["optimizer"]["param_groups"]) for group in inner.optimizer.param_groups]
        inner.load_state_dict({**shared, "optimizer": {**shared["optimizer"], "param_groups": groups}})
        _take(inner, parameters, loaded.get("param_state", {}))


def _settings(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved settings of a group of parameters, which are those of experts and of others alike; Adam's come from the current recipe."""
    own = {key: group[key] for key in (*param_group_identifier_keys, *_OF_THE_RECIPE)}
    shared = set(param_group_identifier_keys) - {_OF_EXPERTS}
    return {**next(other for other in saved if all(other[key] == own[key] for key in shared)), **own}


def _numbered(optimizer: Any) -> Iterator[tuple[Any, list[_Parameter]]]:
    """The distributed optimizers with their parameters, numbered one after the other."""
    first = 0
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = _parameters(inner, first)
        first += len(parameters)
        yield inner, parameters


@dataclass(frozen=True)
class _Parameter:
    """A parameter in the flat order of the optimizer's buffers."""

    number: int
    """Its number in the checkpoint."""
    module: Any
    slices: tuple[range, ...]
    """The elements that each data-parallel rank holds, possibly none."""
    keeper: int
    """The data-parallel rank that writes and reads it."""


def _parameters(inner: Any, first_number: int) -> list[_Parameter]:
    """The parameters of this rank's stage and tensor-parallel share; the same on every data-parallel rank."""
    world = inner.data_parallel_group.size()
    found: list[tuple[Any, tuple[range, ...]]] = []
    for buffer in inner.buffers:
        for module, (start, stop, bucket) in buffer.param_index_map.items():
            first, share = buffer.buckets[bucket].offset, buffer.buckets[bucket].grad_data.numel() // world
            held = (range(max(start, first + n * share), min(stop, first + (n + 1) * share)) for n in range(world))
            found.append((module, tuple(range(part.start - start, max(part.stop, part.start) - start) for part in held)))
    loads = [(0, rank) for rank in range(world)]
    keepers: dict[int, int] = {}
    for number in sorted(range(len(found)), key=lambda n: (-found[n][0].numel(), n)):  # largest first, each to the least loaded rank
        load, rank = heapq.heappop(loads)
        keepers[number] = rank
        heapq.heappush(loads, (load + found[number][0].numel(), rank))
    return [_Parameter(first_number + n, module, slices, keepers[n]) for n, (module, slices) in enumerate(found)]


def _sharded(inner: Any, parameters: list[_Parameter], model: dict[str, Any], loading: bool) -> dict[int, dict[str, Any]]:
    """The parameters that this rank keeps, by number: one sharded tensor per kind, uninitialised if `loading`."""
    rank = inner.data_parallel_group.rank()
    tensors, _ = extract_sharded_tensors_and_factories(model)
    described = {id(sharded.data): sharded for sharded in _flat(tensors)}
    mine = [parameter for parameter in parameters if parameter.keeper == rank]
    content: dict[int, dict[str, Any]] = {parameter.number: {} for parameter in mine}
    for kind in KINDS:
        whole = [torch.empty(p.module.numel()) for p in mine] if loading else list(_to_keepers(inner, parameters, kind))
        for parameter, flat in zip(mine, whole, strict=True):
            like = described[id(parameter.module)]
            data = flat.view(parameter.module.shape)
            named = {"key": f"optimizer.state.{kind}.{like.key}", "data": data, "replica_id": (*like.replica_id[:2], 0)}
            dtype = {} if isinstance(like, ShardedTensorFactory) else {"dtype": data.dtype}
            content[parameter.number][kind] = replace(like, **named, **dtype)
    return content


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _flat(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _to_keepers(inner: Any, parameters: list[_Parameter], kind: str) -> Iterator[Tensor]:
    """Yield the parameters that this rank keeps, in order, whole, in fp32 in host memory. Every data-parallel rank must call."""
    rank, world = inner.data_parallel_group.rank(), inner.data_parallel_group.size()
    sends = [[p for p in parameters if p.keeper == other and len(p.slices[rank])] for other in range(world)]
    held = [inner._get_main_param_and_optimizer_states(p.module)[kind].detach().float().cpu() for part in sends for p in part]
    mine = [p for p in parameters if p.keeper == rank]
    received = _exchange(
        inner, held, [sum(len(p.slices[rank]) for p in part) for part in sends], [sum(len(p.slices[n]) for p in mine) for n in range(world)]
    )
    parts = [iter(part.split([len(p.slices[n]) for p in mine])) for n, part in enumerate(received)]
    for _ in mine:
        yield torch.cat([next(part) for part in parts])


def _take(inner: Any, parameters: list[_Parameter], content: dict[int, dict[str, Tensor]]) -> None:
    """Send parameters from the ranks that read them to the ranks that hold slices of them. Every data-parallel rank must call."""
    rank, world = inner.data_parallel_group.rank(), inner.data_parallel_group.size()
    mine = [p for p in parameters if p.keeper == rank]
    needs = [[p for p in parameters if p.keeper == other and len(p.slices[rank])] for other in range(world)]
    found: dict[int, dict[str, Tensor]] = {p.number: {} for part in needs for p in part}
    for kind in KINDS:
        cut = [content[p.number][kind].flatten()[p.slices[n].start : p.slices[n].stop] for n in range(world) for p in mine]
        received = _exchange(
            inner,
            cut,
            [sum(len(p.slices[n]) for p in mine) for n in range(world)],
            [sum(len(p.slices[rank]) for p in part) for part in needs],
        )
        for part, values in zip(needs, received, strict=True):
            for p, piece in zip(part, values.split([len(p.slices[rank]) for p in part]), strict=True):
                found[p.number][kind] = piece
    for p in parameters:
        if len(p.slices[rank]):
            inner._set_main_param_and_optimizer_states(p.module, found[p.number])


def _exchange(inner: Any, held: list[Tensor], sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
    """One all-to-all of fp32 in host memory. Sends `held`, concatenated, with `sent[n]` elements going to rank n; returns the tensor
    received from each rank, with `received[n]` elements from rank n."""
    outgoing = torch.cat(held) if held else torch.empty(0)
    incoming = torch.empty(sum(received))
    group = inner.data_parallel_group_gloo or inner.data_parallel_group
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    return incoming.split(received)
