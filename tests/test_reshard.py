"""The resharding plan: every transfer against the plain gather, and no unnecessary byte."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from ranks import on_ranks
from tiny import MODELS, recipe, save_model

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.plan.models import KNOWN
from megafork.plan.refit import cost, cost_of_full_gather, lower_bound
from megafork.recipe import Parallel, Recipe, RecipeError
from megafork.shape import Mixture, Shape, Span, check_layout, check_rollout_tp, check_world, read_shape
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.mapping import Parameter, Piece, full_shape, parameters, pieces, shard_shape
from megafork.weights.policy_weights import export_policy, load_policy
from megafork.weights.refit import Bridge
from megafork.weights.reshard import Reshard, Transfer, needed

TINY_SHAPE = Shape("Qwen3ForCausalLM", 4, 64, 96, 4, 2, 32, 99, True, 1e-6, 1e4, None, 512)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "DP2": (2, {}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP4, 2 KV heads": (4, {"tp": 4}),
    "PP2 VPP2 DP2": (4, {"pp": 2, "vpp": 2}),
    "PP2 CP2, uneven": (4, {"pp": 2, "cp": 2, "last_stage_layers": 1}),
    "TP2 PP2 DP2": (8, {"tp": 2, "pp": 2}),
}


def _stream_and_gather(spec: Recipe, engines: list[int]) -> list[tuple[int, int, int, bool]]:
    """For each engine size, on one node and on several: bytes received, the least possible, the largest buffer, and whether all that is
    needed is right."""
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    folder = Path(spec.model.path)
    shape = read_shape(folder)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    whole = dict(export_policy(chunks, shape, mesh))
    seen = []
    assert Bridge(chunks, shape, mesh, 1).plan.node == mesh.world, "all ranks are on this host"
    for tp, node in itertools.product(engines, (None, 1, 2, 3)):
        bridge = Bridge(chunks, shape, mesh, tp, node)
        del bridge.plan.__dict__["_stages"]  # a refit that planned anything would ask for it
        got = dict(bridge)
        assert "_stages" not in bridge.plan.__dict__
        assert set(got) == set(whole)
        right, least = True, 0
        for name, tensor in whole.items():
            right &= got[name].shape == tensor.shape
            for rows, columns in needed(name, shape, tp, mesh.rank % tp):
                part = (slice(*rows), slice(*columns)) if columns else slice(*rows)
                right &= torch.equal(got[name][part], tensor[part])
                least += tensor[part].nbytes
        seen.append((bridge.received, least - _held(shape, spec.parallel, tp, mesh.rank, mesh.world, whole), bridge.buffer, right))
    return seen


def _held(shape: Shape, layout: Parallel, tp: int, rank: int, world: int, whole: dict[str, torch.Tensor]) -> int:
    """Bytes of what the rank's engine needs that the rank holds itself, counted element by element."""
    stage, plan, held = rank * layout.pp // world, Reshard(shape, layout, world, tp), 0
    for parameter in parameters(shape):
        if plan.stage(parameter) != stage:
            continue
        for piece in pieces_at(parameter, shape, layout, rank % (world // layout.pp)):
            mine, wanted = (torch.zeros(full_shape(piece.name, shape), dtype=torch.bool) for _ in range(2))
            mine[slice(*piece.rows), *([slice(*piece.columns)] if piece.columns else [])] = True
            for rows, columns in needed(piece.name, shape, tp, rank % tp):
                wanted[slice(*rows), *([slice(*columns)] if columns else [])] = True
            held += int((mine & wanted).sum()) * whole[piece.name].element_size()
    return held


def pieces_at(parameter: Parameter, shape: Shape, layout: Parallel, place: int) -> list[Piece]:
    """What the rank at this place of its stage holds. Of experts, by Megatron's order: etp fastest, then ep."""
    if parameter.expert is None:
        return pieces(parameter, shape, layout.tp, place % layout.tp)
    etp = layout.expert_tp
    mine = parameter.expert * layout.ep // shape.mixture.experts == place // etp % layout.ep
    return pieces(parameter, shape, etp, place % etp) if mine else []


CASES = [
    pytest.param(layout, model, ("fp32", "bf16")[(n + m) % 2], marks=pytest.mark.slow if (n + m) % 3 else ())
    for n, layout in enumerate(LAYOUTS)
    for m, model in enumerate(("tied", "untied", "Phi-4"))
]
"""Every model in every layout, and both dtypes with each of either; a third of them fast, again with each of either."""


@pytest.mark.parametrize(("layout", "model", "dtype"), CASES)
def test_every_rank_gets_what_its_engine_needs_and_nothing_else(layout: str, model: str, dtype: str, tmp_path: Path) -> None:
    check_refit(*LAYOUTS[layout], model, dtype, tmp_path)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {"ep": 2}), (4, {"ep": 2, "tp": 2, "sp": True}), (4, {"ep": 2, "etp": 2, "tp": 2, "sp": True}), (4, {"ep": 2, "pp": 2})],
)
def test_no_rank_gets_experts_that_it_holds_or_does_not_need(world: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    check_refit(world, parallel, "MoE, some layers dense", "fp32", tmp_path)


def check_refit(world: int, parallel: dict[str, Any], model: str, dtype: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[model]
    folder = save_model(tmp_path, architecture, **changes)
    spec = recipe(folder, parallel=parallel, precision={"dtype": dtype})
    engines = [tp for tp in (1, 2, 4) if world % tp == 0]
    shape = read_shape(folder)
    buckets = Reshard(shape, spec.parallel, world, 1).buckets
    largest = max(sum(torch.Size(full_shape(name, shape)).numel() for p in bucket for name in p.huggingface()) for bucket in buckets)
    for seen in on_ranks(world, _stream_and_gather, spec, engines):
        for received, least, buffer, right in seen:
            assert right
            assert received == least
            assert buffer <= 4 * largest * (4 if dtype == "fp32" else 2)


NODES: dict[str, tuple[int, dict[str, Any], int]] = {  # world, layout, ranks a node
    "TP2 PP2 DP2": (8, {"tp": 2, "pp": 2}, 2),
    "TP2 PP2, wide nodes": (8, {"tp": 2, "pp": 2}, 4),
    "PP2 VPP2 CP2": (8, {"pp": 2, "vpp": 2, "cp": 2}, 4),
    "TP4, 2 KV heads": (8, {"tp": 4}, 2),
    "a node that is not full": (6, {"tp": 2}, 4),
}


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"architecture": "Phi3ForCausalLM"}], ids=["tied", "untied", "fused"])
@pytest.mark.parametrize("name", NODES)
def test_the_lower_bound_counts_each_element_that_a_rank_or_a_node_lacks(name: str, changes: dict[str, Any]) -> None:
    world, parallel, node = NODES[name]
    shape, layout = replace(TINY_SHAPE, **changes), Parallel(**parallel)
    for tp in (tp for tp in (1, 2, 4) if world % tp == 0):
        plan = Reshard(shape, layout, world, tp, node)
        lacked = [_lacked(plan, range(rank, rank + 1)) for rank in range(world)]
        bound = lower_bound(plan)
        assert bound.received == max(lacked) == cost(plan).received
        assert cost(plan).total == sum(lacked)
        assert bound.between_nodes == sum(_lacked(plan, range(first, min(first + node, world))) for first in range(0, world, node))
        assert bound.between_nodes == cost(plan).between_nodes


def _lacked(plan: Reshard, ranks: range) -> int:
    """Elements that an engine of these ranks loads and none of them holds, marked one by one."""
    shape, layout = plan.shape, plan.layout
    sizes = {name: full_shape(name, shape) for parameter in parameters(shape) for name in parameter.huggingface()}
    wanted, held = ({name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()} for _ in range(2))
    for rank in ranks:
        for name in sizes:
            for rows, columns in plan.needed(name, rank):
                wanted[name][(slice(*rows), slice(*columns)) if columns else slice(*rows)] = True
        for parameter in parameters(shape):
            if plan.stage(parameter) == rank * layout.pp // plan.world:
                for piece in pieces_at(parameter, shape, layout, rank % (plan.world // layout.pp)):
                    held[piece.name][(slice(*piece.rows), slice(*piece.columns)) if piece.columns else slice(*piece.rows)] = True
    return sum(int((wanted[name] & ~held[name]).sum()) for name in sizes)


SHAPE_32B = KNOWN["qwen3-32b"]


@pytest.mark.parametrize("rollout_tp", [4, 8])
@pytest.mark.parametrize("layout", [Parallel(tp=8, pp=4), Parallel(tp=4, pp=4, sp=True), Parallel(tp=8, pp=2, cp=2), Parallel(tp=8)])
def test_the_plan_for_32b_needs_no_communication_and_little_traffic(layout: Parallel, rollout_tp: int) -> None:
    plan = Reshard(SHAPE_32B, layout, 64, rollout_tp)
    ours, plain = cost(plan), cost_of_full_gather(plan)
    model = sum(torch.Size(full_shape(name, SHAPE_32B)).numel() for parameter in parameters(SHAPE_32B) for name in parameter.huggingface())
    assert model == 32_762_123_264  # the published number of parameters
    assert ours.received <= 1.01 * model / rollout_tp  # norms go to all
    assert ours.total < plain.total / (rollout_tp - 1)
    assert ours.sent <= 4 * model / rollout_tp, "the senders share the work"
    assert ours.between_nodes == lower_bound(plan).between_nodes, "no byte reaches a node twice"
    if layout.tp == rollout_tp and layout.pp == 1:
        assert ours.received == 0, "nothing moves where the layouts match"


@st.composite
def _plans(draw: st.DrawFn) -> Reshard:
    """Any plan that the checks of a recipe allow; nodes may cut through engines, model replicas and stages, and the last may be short."""
    tp, pp, replicas = (draw(st.integers(1, most)) for most in (6, 3, 4))
    world = tp * pp * replicas
    rollout_tp = draw(st.sampled_from([n for n in range(1, 7) if world % n == 0]))
    sizes: dict[str, Any] = {"layers": 2 * pp, "hidden": 48, "heads": 12, "kv_heads": draw(st.sampled_from([1, 2, 3, 4, 6]))}
    sizes |= {"ffn": 60, "head_dim": 4, "tied": draw(st.booleans())}
    shape = replace(TINY_SHAPE, architecture=draw(st.sampled_from(["Qwen3ForCausalLM", "Phi3ForCausalLM", "Qwen3MoeForCausalLM"])), **sizes)
    layout = Parallel(tp=tp, pp=pp)
    if shape.family.experts:
        ep = draw(st.sampled_from([1, 2, 3, 6]))
        layout = Parallel(tp=tp, pp=pp, sp=tp > 1, ep=ep, etp=draw(st.sampled_from([None, 2])) if ep > 1 else None)
        shape = replace(shape, moe=Mixture(6, 2, 12, True, layers=(0, *range(2, 2 * pp))))
    plan = Reshard(shape, layout, world, rollout_tp, draw(st.integers(1, world)), bool(shape.family.experts) and draw(st.booleans()))
    try:
        check_layout(shape, plan.layout)
        check_world(plan.layout, world)
        check_rollout_tp(shape, rollout_tp, whole_experts=plan.whole_experts)
    except RecipeError:
        reject()
    return plan


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(plan=_plans())
def test_carried_out_any_plan_gives_each_rank_what_a_gather_would(plan: Reshard) -> None:
    """The routes of all ranks, each planned for itself, are carried out with tensors whose elements all differ."""
    world, shape = range(plan.world), plan.shape
    sizes = {name: full_shape(name, shape) for parameter in parameters(shape) for name in parameter.huggingface()}
    counts = [torch.Size(size).numel() for size in sizes.values()]
    whole = {name: part.view(sizes[name]) for name, part in zip(sizes, torch.arange(sum(counts)).split(counts), strict=True)}
    got = [{name: torch.full(size, -1) for name, size in sizes.items()} for _ in world]
    shards = [_shards(plan, rank, whole) for rank in world]
    between = 0
    for number, routes in enumerate(zip(*(plan.routes(rank) for rank in world), strict=True)):
        everything = list(plan.transfers(plan.buckets[number]))
        for step, rounds in enumerate(zip(*routes, strict=True)):
            before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in got]  # a round sends what it begins with
            for rank, route in enumerate(rounds):
                now = [transfer for transfer in everything if transfer.relayed == bool(step)]
                assert route.sends == _grouped([t for t in now if t.source == rank], "target")
                assert route.receives == _grouped([t for t in now if t.target == rank], "source")
                for transfer in itertools.chain(*route.receives.values()):
                    part = _at(got[rank][transfer.name], transfer.rows, transfer.columns)
                    assert (part == -1).all(), "received twice"
                    part.copy_(_sent(transfer, shards, before))
                    between += transfer.numel * (transfer.source // plan.node != rank // plan.node)
    for rank in world:
        for name, tensor in whole.items():
            expected = torch.full_like(tensor, -1)
            for rows, columns in plan.needed(name, rank):
                _at(expected, rows, columns).copy_(_at(tensor, rows, columns))
            assert torch.equal(got[rank][name], expected), (rank, name)
    assert between == sum(_lacked(plan, range(first, min(first + plan.node, plan.world))) for first in range(0, plan.world, plan.node))


def _shards(plan: Reshard, rank: int, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a rank holds: its stage's parameters, each its shard; experts of other ranks are full of numbers that nobody wants."""
    held = {}
    for parameter in parameters(plan.shape):
        if plan.stage(parameter) == rank * plan.layout.pp // plan.world:
            tp = plan.layout.tp if parameter.expert is None else plan.layout.expert_tp
            held[parameter.name] = torch.full(shard_shape(parameter, plan.shape, tp), -2)
            for piece in pieces_at(parameter, plan.shape, plan.layout, rank % (plan.world // plan.layout.pp)):
                part = _at(whole[piece.name], piece.rows, piece.columns)
                held[parameter.name][piece.at : piece.at + len(part)] = part
    return held


def _sent(transfer: Transfer, shards: list[dict[str, torch.Tensor]], received: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    if transfer.relayed:
        return _at(received[transfer.source][transfer.name], transfer.rows, transfer.columns)
    high, columns = transfer.rows[1] - transfer.rows[0], transfer.columns
    width = (transfer.left, transfer.left + columns[1] - columns[0]) if columns else None
    return _at(shards[transfer.source][transfer.parameter], (transfer.at, transfer.at + high), width)


def _at(tensor: torch.Tensor, rows: Span, columns: Span | None) -> torch.Tensor:
    return tensor[slice(*rows), slice(*columns)] if columns else tensor[slice(*rows)]


def _grouped(transfers: list[Transfer], by: str) -> dict[int, list[Transfer]]:
    groups: dict[int, list[Transfer]] = {}
    for transfer in transfers:
        groups.setdefault(getattr(transfer, by), []).append(transfer)
    return groups


@pytest.mark.parametrize("world", [512, 4096])
def test_a_run_plans_its_refits_once_and_quickly(world: int) -> None:
    plan = Reshard(SHAPE_32B, Parallel(tp=8, pp=4, sp=True), world, 8)
    begin = time.process_time()
    plan.routes(world // 2 + 3)
    assert time.process_time() - begin < 1.0
