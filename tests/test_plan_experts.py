"""The planner of mixtures of experts against models that were built, and against what their forward and backward allocate."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from measure import Sent, peak_bytes
from public_models import MODELS
from ranks import on_ranks
from test_plan import H100
from test_plan_memory import TOKENS, activation_recipe, check_held, forward_backward, learner_and_micros
from test_reshard import pieces_at
from tiny import recipe
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from megafork.model.experts import routers
from megafork.plan import experts
from megafork.plan.activations import stage_activations
from megafork.plan.hardware import BUSIEST
from megafork.plan.memory import engine_memory
from megafork.plan.models import KNOWN
from megafork.plan.parameters import count_active, count_parameters, layer_parameters
from megafork.plan.refit import count_refit
from megafork.recipe import Parallel, Recipe
from megafork.shape import Mixture, Shape, read_shape
from megafork.weights.mapping import huggingface_shapes, parameters
from megafork.weights.reshard import Reshard, needed

SHAPE = Shape("Qwen3MoeForCausalLM", 4, 64, 96, 4, 2, 32, 99, False, 1e-6, 1e4, None, 512, Mixture(4, 2, 48, True, (0, 1, 2, 3)))
SOME_DENSE: dict[str, Any] = {"moe": Mixture(4, 2, 48, True, (1, 3))}

# (ranks, recipe sections, changes of the model)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ep1-tp2": (2, {"parallel": {"tp": 2, "sp": True}}, {}),
    "ep2-overlap-bf16": (4, {"parallel": {"ep": 2}, "precision": {"dtype": "bf16"}, "optimizer": {"overlap": True}}, {}),
    "ep2-tp2-sp": (2, {"parallel": {"ep": 2, "tp": 2, "sp": True}}, SOME_DENSE),
    "ep2-etp2": (4, {"parallel": {"ep": 2, "etp": 2}, "precision": {"dtype": "bf16"}}, {}),
    "ep2-pp2-tied": (4, {"parallel": {"ep": 2, "pp": 2}}, {"tied": True, "moe": Mixture(4, 2, 48, True, (2, 3))}),
    "ep2-pp2-vpp2": (4, {"parallel": {"ep": 2, "pp": 2, "vpp": 2}}, SOME_DENSE),
    "ep2-cp2-dp2": (4, {"parallel": {"ep": 2, "cp": 2}}, {}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_gradients_and_optimizer_are_those_of_a_built_model(name: str) -> None:
    world, sections, changes = LAYOUTS[name]
    check_held(world, recipe(Path("unused"), **sections), replace(SHAPE, **changes))


# ---- activations, traffic, arithmetic

WIDE = Shape("Qwen3MoeForCausalLM", 4, 128, 256, 4, 2, 32, 512, False, 1e-6, 1e4, None, 2048, Mixture(8, 4, 64, True, (0, 1, 2, 3)))
MICROS = 3


class Measured(NamedTuple):
    """Of one rank: see `measure`."""

    peak: int
    held: int
    skew: float
    sent: int
    """Bytes that all-to-alls deliver in a forward and backward."""
    matmuls: int
    """FLOP of matrix products of two matrices in a forward and backward."""


def measure(spec: Recipe, shape: Shape) -> Measured:
    """A forward and backward of rank 0. Its neighbours are torch's fake process group: whatever it gathers is its own, and so what it gets
    is what its own router sends to its own experts, times the ranks. `skew`: that, as a multiple of the mean."""
    layout = spec.parallel
    if (world := layout.smallest_world // layout.pp) > 1:
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    learner, micros = learner_and_micros(spec, MICROS, shape)
    with Sent() as sent, FlopCounterMode(display=False) as flops:
        forward_backward(learner, micros, spec)  # what is allocated once is there afterwards
    sparse = [layer.mlp for chunk in learner.chunks for layer in chunk.decoder.layers if hasattr(layer.mlp, "token_dispatcher")]
    dispatchers = [mlp.token_dispatcher for mlp in sparse]
    kept = ("probs", "routing_map", "reversed_local_input_permutation_mapping")
    held = sum(getattr(dispatcher, name).nbytes for dispatcher in dispatchers for name in kept)
    seen = sum(router.seen[:-1] for chunk in learner.chunks for router in routers(chunk).values())
    own = float(seen[: shape.mixture.experts // layout.ep].sum() / seen.sum()) * layout.ep
    exchanged = sum(size for name, size in sent.calls if name.startswith("alltoall"))
    peak = peak_bytes(lambda: forward_backward(learner, micros, spec))
    return Measured(peak, held, own, exchanged, flops.get_flop_counts()["Global"][torch.ops.aten.mm])


SOME_LAYERS: dict[str, Any] = {"moe": replace(WIDE.mixture, layers=(1, 3))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "dtype", "parallel", "changes"),
    [
        ("none", "bf16", {"ep": 2}, {}),
        ("full", "bf16", {"ep": 2, "tp": 2, "sp": True}, {}),
        ("none", "fp32", {"ep": 2, "etp": 2}, SOME_LAYERS),
        ("full", "bf16", {"tp": 2, "sp": True}, {}),
        ("selective", "bf16", {"ep": 4}, {}),
        ("none", "bf16", {"pp": 2}, SOME_LAYERS),
    ],
)
def test_a_run_allocates_sends_and_multiplies_what_is_planned(
    recompute: str, dtype: str, parallel: dict[str, Any], changes: dict[str, Any]
) -> None:
    spec, shape = activation_recipe(recompute, dtype, parallel), replace(WIDE, **changes)
    layout, width = spec.parallel, {"bf16": 2, "fp32": 4}[dtype]
    local, moe = TOKENS / layout.cp, shape.mixture
    for stage, real in enumerate(on_ranks(layout.pp, measure, spec, shape)):
        planned = stage_activations(
            shape, spec, stage, tokens=TOKENS, micro_batches=MICROS, head_rows=TOKENS // 5, layers="cpu", skew=real.skew
        )
        assert planned.kept + planned.working == pytest.approx(real.peak, rel=0.15), f"stage {stage}"
        assert planned.routing == real.held  # is there already
        sparse = len([layer for layer in moe.layers if layer * layout.pp // shape.layers == stage])
        passes = 3 if recompute == "full" else 2
        copies = local * moe.per_token / layout.tp
        if layout.ep > 1 and layout.expert_tp == 1:  # with etp, gloo also gathers by all-to-alls
            # there, with its weight in fp32, and back; in all passes but the recomputation the weights come back as a gradient
            rows = (shape.hidden * width + 4) * copies * real.skew + shape.hidden * width * copies
            backward = shape.hidden * width * copies * real.skew + (shape.hidden * width + 4) * copies
            assert real.sent == pytest.approx(MICROS * sparse * ((passes - 1) * rows + backward), rel=0.01)
            sent = experts.traffic(shape, layout, width)
            mean = 2 * shape.hidden * width * copies / local * (1 - 1 / layout.ep)
            assert sent.in_node == pytest.approx(mean) and sent.between_nodes == 0
        if layout.pp == 1 and not changes and recompute != "full":
            shared = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads) / layout.tp
            active = shape.hidden * (moe.experts + 3 * moe.per_token * moe.ffn * real.skew)
            head = real.matmuls - MICROS * 3 * 2 * local * shape.layers * (shared + active)
            assert 0 <= head < 8 * 2 * MICROS * TOKENS * shape.hidden * shape.vocab
            assert experts.weights_of_a_token(shape, layout) == shape.hidden * (moe.experts + 3 * moe.per_token * moe.ffn * BUSIEST)


def test_tokens_leave_the_node_where_experts_are_on_several() -> None:
    def rows(**layout: Any) -> tuple[float, float]:
        sent = experts.traffic(KNOWN["qwen3-30b-a3b"], Parallel(**layout), 2)
        return sent.in_node / (2 * 2048), sent.between_nodes / (2 * 2048)

    assert rows() == (0, 0)
    assert rows(ep=8) == pytest.approx((2 * 8 * 7 / 8, 0))
    assert rows(ep=16) == pytest.approx((2 * 8 * 7 / 16, 2 * 8 / 2))
    assert rows(ep=8, tp=2, sp=True) == pytest.approx((8 * 7 / 8, 0))
    # half of the tokens' copies come from the rank that shares the expert; they are added up in fp32
    assert rows(ep=8, etp=2) == pytest.approx((2 * 8 * 3 / 8 + 8 + 16, 2 * 8 / 2))


def test_a_large_batch_decodes_with_all_experts() -> None:
    shape = KNOWN["qwen3-30b-a3b"]
    assert experts.touched(shape, 1) == 8 / 128
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(2000, 16, 128, generator=generator).topk(8).indices.flatten(1)
    drawn = sum(len(row.unique()) for row in chosen) / len(chosen) / 128
    assert experts.touched(shape, 16) == pytest.approx(drawn, rel=0.02)
    assert experts.touched(shape, 256) == pytest.approx(1.0, abs=1e-6)


# ---- published models, engines, a refit


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_known_shapes_are_those_of_the_published_configs(name: str, tmp_path: Path) -> None:
    """Totals of the safetensors files on the hub; the active parameters are in the models' names."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    shape = KNOWN[name.lower()]
    assert replace(shape, norm_eps=1e-6) == read_shape(tmp_path)
    total, active = {"Qwen3-30B-A3B": (30_532_122_624, 3.3e9), "Qwen3-235B-A22B": (235_093_634_560, 22e9)}[name]
    assert count_parameters(shape) == total == sum(math.prod(size) for size in huggingface_shapes(shape).values())
    assert count_active(shape) == pytest.approx(active, rel=0.02)
    shared, of_experts = layer_parameters(shape, sparse=True)
    assert count_parameters(shape) - shape.layers * (shared + of_experts) == (2 * shape.vocab + 1) * shape.hidden


@pytest.mark.parametrize("changes", [{}, SOME_DENSE], ids=["all", "some dense"])
@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_holds_the_parts_that_it_loads(tp: int, changes: dict[str, Any]) -> None:
    shape = replace(SHAPE, **changes)
    engine = engine_memory(shape, recipe(Path("unused"), rollout={"tp": tp, "kv_cache_mb": 8}), H100)

    def size(names: list[str]) -> int:
        parts = [part for name in names for part in needed(name, shape, tp, 0)]
        return 4 * sum(math.prod(stop - start for start, stop in filter(None, part)) for part in parts)

    names = list(huggingface_shapes(shape))
    assert engine.weights == size(names) and engine.experts == size([name for name in names if ".experts." in name]) > 0


REFITS: dict[str, tuple[Parallel, int, int, dict[str, Any]]] = {
    "ep2-pp2": (Parallel(ep=2, pp=2), 8, 2, {"moe": Mixture(4, 2, 48, True, (1, 2, 3))}),
    "ep2-etp2-tp2": (Parallel(ep=2, etp=2, tp=2, sp=True), 8, 1, {}),
    "ep4": (Parallel(ep=4), 4, 2, {}),
    "tp2": (Parallel(tp=2, sp=True), 4, 4, {}),
}


@pytest.mark.parametrize("name", REFITS)
def test_a_refit_moves_what_is_counted(name: str) -> None:
    """Element by element: which a rank holds, which its engine loads, and which each transfer brings."""
    layout, world, rollout_tp, changes = REFITS[name]
    shape = replace(SHAPE, layers=4, vocab=128, **changes)
    counted, per_stage = count_refit(shape, layout, world, rollout_tp), world // layout.pp
    held, loaded = (
        [{n: torch.zeros(s, dtype=torch.bool) for n, s in huggingface_shapes(shape).items()} for _ in range(world)] for _ in "12"
    )
    plan = Reshard(shape, layout, world, rollout_tp, 8)
    for rank, parameter in itertools.product(range(world), list(parameters(shape))):
        if rank // per_stage == plan.stage(parameter):
            for piece in pieces_at(parameter, shape, layout, rank % per_stage):
                held[rank][piece.name][slice(*piece.rows)][..., slice(*(piece.columns or (None, None)))] = True
        for hf in parameter.huggingface():
            for rows, columns in plan.needed(hf, rank):
                loaded[rank][hf][slice(*rows)][..., slice(*(columns or (None, None)))] = True
    missing = [{n: need & ~own[n] for n, need in loads.items()} for own, loads in zip(held, loaded, strict=True)]
    least = [sum(int(mask.sum()) for mask in masks.values()) for masks in missing]
    assert counted.plan.received == counted.least.received == max(least) and counted.plan.total == sum(least)
    assert counted.plan.between_nodes == counted.least.between_nodes == 0
    brought = [{n: torch.zeros_like(mask) for n, mask in masks.items()} for masks in missing]
    for bucket in plan.buckets:
        for move in plan.transfers(bucket):
            if move.source != move.target:
                brought[move.target][move.name][slice(*move.rows)][..., slice(*(move.columns or (None, None)))] = True
    assert all(torch.equal(got[n], want[n]) for got, want in zip(brought, missing, strict=True) for n in want)
    total = count_parameters(shape)
    assert counted.gather.received == max(total - sum(int(mask.sum()) for mask in own.values()) for own in held)
