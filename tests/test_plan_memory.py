"""What the plan says of weights, optimizer and activations, against models that are built and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from measure import peak_bytes
from ranks import on_ranks
from tiny import recipe, save_model
from torch.testing._internal.distributed.fake_pg import FakeStore

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.plan.activations import stage_activations
from megafork.plan.parameters import lay_out, stage_weights
from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.loss import policy_loss
from megafork.rl.packing import packer
from megafork.shape import Shape, read_shape
from megafork.train.learner import Learner


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


SHAPE = Shape("Qwen3ForCausalLM", 4, 128, 384, 4, 2, 32, 512, False, 1e-6, 1e4, None, 2048)
"""Wide enough that activations outweigh everything else at TOKENS tokens."""
TOKENS, RESPONSES = 1024, 8
"""Of a micro-batch. The responses are short, for with context parallelism the CPU's attention keeps a mask that a GPU's does not need."""


# (ranks, recipe sections, changes of the model)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"parallel": {"tp": 2}}, {}),
    "dp2-bf16": (2, {"precision": {"dtype": "bf16"}}, {}),
    "dp3-untied": (3, {}, {"tied": False}),
    "pp2-uneven-tied": (2, {"parallel": {"pp": 2, "first_stage_layers": 1}, "precision": {"dtype": "bf16"}}, {}),
    "pp2-vpp2-dp2": (4, {"parallel": {"pp": 2, "vpp": 2}}, {"tied": False}),
    "cp2-overlap-bf16": (2, {"parallel": {"cp": 2}, "precision": {"dtype": "bf16"}, "optimizer": {"overlap": True}}, {}),
    "tp2-sp-pp2-bf16": (4, {"parallel": {"tp": 2, "sp": True, "pp": 2}, "precision": {"dtype": "bf16"}}, {}),
    "tp4-half-a-group": (4, {"parallel": {"tp": 4}}, {"vocab": 101}),
    "qwen2-with-biases": (2, {"parallel": {"tp": 2}}, {"architecture": "Qwen2ForCausalLM"}),
    "mistral": (2, {"parallel": {"pp": 2}}, {"architecture": "MistralForCausalLM", "tied": False}),
    "phi3-fused": (2, {"parallel": {"tp": 2}}, {"architecture": "Phi3ForCausalLM", "tied": False}),
}


def really_held(spec: Recipe, shape: Shape) -> tuple[int, int, int, int]:
    """Parameters, and bytes of weights, gradients and optimizer state, counted on a rank's storage."""
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    learner = Learner(chunks, spec, mesh, updates=1)
    buffers = [buffer for chunk in learner.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for chunk in chunks for p in chunk.parameters()}
    inner = list(getattr(learner.optimizer, "chained_optimizers", [learner.optimizer]))
    moments = [state[name] for adam in inner for state in adam.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    mains = [p for adam in inner for group in getattr(adam, "shard_fp32_from_float16_groups", []) for p in group if p is not None]
    return (
        sum(p.numel() for chunk in chunks for p in chunk.parameters()),
        sum(weights.values()),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        sum(tensor.numel() * 4 for tensor in [*moments, *mains]),
    )


def check_held(world: int, spec: Recipe, shape: Shape) -> None:
    """The plan's weights, gradients and optimizer are those of the model that `world` ranks build."""
    layout = spec.parallel
    for rank, held in enumerate(on_ranks(world, really_held, spec, shape)):
        planned = stage_weights(shape, spec, rank * layout.pp // world, world)
        in_stage = rank % (world // layout.pp)  # ranks go tp, cp, dp, pp
        expected = (planned.parameters, planned.weight_bytes, planned.gradient_bytes, planned.optimizer_bytes[in_stage])
        assert held == expected, f"rank {rank}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_gradients_and_optimizer_are_those_of_a_built_model(name: str, tiny: Path) -> None:
    world, sections, changes = LAYOUTS[name]
    check_held(world, recipe(tiny, **sections), replace(read_shape(tiny), **changes))


def test_overlap_cuts_the_first_stage_into_buckets_that_all_ranks_share_evenly() -> None:
    buffer = lay_out([(100, False), (1000, False), (30, False)], shards=6, bucket_size=900)
    assert buffer.spans == ((0, 30), (64, 1064), (1152, 1252))
    assert buffer.buckets == ((0, 1152), (1152, 1536))  # multiples of 384 = lcm(6, 128)
    assert sum(buffer.shards(6)) == buffer.parameters == 1130


def micro_batch(spec: Recipe, mesh: Any, seed: int) -> MicroBatch:
    """TOKENS tokens in RESPONSES responses, their prompts included, of which the update takes every fifth."""
    generator = torch.Generator().manual_seed(seed)
    responses = []
    for number in range(RESPONSES):
        prompt, answer = (torch.randint(0, 500, (n,), generator=generator, dtype=torch.int32) for n in (32, TOKENS // RESPONSES - 31))
        responses.append(Response(0, number, 0, prompt, answer, torch.zeros(len(answer)), False, advantage=1.0))
    micro = packer(mesh, whole=spec.micro_batch_padding, temperature=spec.rollout.temperature)(responses)
    count = len(micro.positions)
    micro.old_log_prob, micro.entropy = torch.zeros(count), torch.zeros(count)
    micro.mask = torch.arange(count) % 5 == 0
    micro.weight = torch.full((count,), 1.0 / count)
    return micro


def learner_and_micros(spec: Recipe, count: int, shape: Shape) -> tuple[Learner, list[MicroBatch]]:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.normal_(0.0, 0.02)
    return Learner(chunks, spec, mesh, updates=9), [micro_batch(spec, mesh, n) for n in range(count)]


def forward_backward(learner: Learner, micros: list[MicroBatch], spec: Recipe) -> None:
    def loss(micro: MicroBatch, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        value, _ = policy_loss(output[0], micro, loss=spec.loss)
        return (micro.weight[micro.mask] * value).sum(), torch.zeros([], dtype=torch.int), {}

    for chunk in learner.model:
        chunk.zero_grad_buffer()
    learner._run(micros, loss, forward_only=False, everywhere=False)


def really_allocated(spec: Recipe, count: int, shape: Shape = SHAPE) -> int:
    """Peak of a forward and backward of this rank.

    Its TP, CP and EP neighbours are torch's fake process group, which moves nothing: gloo copies what it sends and frees it from threads
    of its own, some time later.
    """
    layout = spec.parallel
    if (world := layout.smallest_world // layout.pp) > 1:
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    learner, micros = learner_and_micros(spec, count, shape)
    forward_backward(learner, micros, spec)  # what is allocated once is there
    return peak_bytes(lambda: forward_backward(learner, micros, spec))


def activation_recipe(recompute: str, dtype: str, parallel: dict[str, Any]) -> Recipe:
    return recipe(
        Path("unused"),
        model={"recompute": recompute},
        precision={"dtype": dtype},
        parallel=parallel,
        rollout={"max_response_length": TOKENS - 32},
        loss={"head_memory_mb": 1},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "dtype", "parallel"),
    [
        ("none", "bf16", {}),
        ("full", "fp32", {}),
        ("full", "bf16", {"pp": 2}),
        ("none", "bf16", {"pp": 2, "first_stage_layers": 1}),
        ("none", "bf16", {"pp": 2, "vpp": 2}),
        ("none", "bf16", {"tp": 2}),
        ("selective", "bf16", {"tp": 2, "sp": True}),
        ("full", "bf16", {"tp": 2, "sp": True}),
        ("none", "bf16", {"tp": 4, "sp": True}),  # half a key-value group a rank
        ("none", "fp32", {"cp": 2}),
        ("full", "bf16", {"cp": 2}),
        ("none", "bf16", {"tp": 2, "sp": True, "cp": 2}),
    ],
)
def test_activations_are_within_a_tenth_of_what_a_run_allocates(recompute: str, dtype: str, parallel: dict[str, Any]) -> None:
    spec, micros = activation_recipe(recompute, dtype, parallel), 3 if parallel.get("vpp", 1) == 1 else 4
    for stage, allocated in enumerate(on_ranks(spec.parallel.pp, really_allocated, spec, micros)):
        planned = stage_activations(SHAPE, spec, stage, tokens=TOKENS, micro_batches=micros, head_rows=TOKENS // 5, layers="cpu")
        assert planned.kept + planned.working == pytest.approx(allocated, rel=0.1), f"stage {stage}"  # `gather` is there already


def test_pipeline_stages_hold_as_many_micro_batches_as_the_schedule_lets_them() -> None:
    def in_flight(parallel: dict[str, Any], micros: int) -> list[float]:
        spec = activation_recipe("none", "bf16", parallel)
        stages = range(spec.parallel.pp)
        return [stage_activations(SHAPE, spec, s, tokens=TOKENS, micro_batches=micros, head_rows=0, layers="cpu").in_flight for s in stages]

    assert in_flight({"pp": 4}, 16) == [4, 3, 2, 1]
    assert in_flight({"pp": 4}, 2) == [2, 2, 2, 1]
    assert in_flight({"pp": 2, "vpp": 2}, 8) == [5, 3]
