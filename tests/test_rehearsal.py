"""The whole update on a GPU simulated by the CPU (`rehearsal`): nothing that CUDA refuses, and the plain path's numbers to the last bit."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import varlen
from planted import FAULTS
from ranks import on_ranks
from rehearsal import DEVICE, Event, Ledger, Refused, rehearse
from rehearsal.step import waits_of
from tiny import recipe, save_model
from training import Rig

from megafork.model import attention, build, policy
from megafork.model.attention import PackedSequences
from megafork.model.rope import FusedRotary
from megafork.parallel import vocab
from megafork.parallel.context import places_of, zigzag_index
from megafork.parallel.quantile import top_thresholds
from megafork.parallel.to_device import to_device
from megafork.recipe import Recipe
from megafork.train.offload import Offload
from megafork.train.sft import cross_entropy, place
from megafork.weights.checkpoint import Checkpoints
from megafork.weights.refit import Bridge

THREE = {"train": {"micro_batch_tokens": 96}}
"""Micro-batches of the step instead of five; one mini-batch has two. Stages, and ranks that share the responses, need more."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {"parallel": {"tp": 2, "sp": True}, **THREE},
    "PP2": {"parallel": {"pp": 2}},
    "PP2 VPP2": {"parallel": {"pp": 2, "vpp": 2}},
    "CP2": {"parallel": {"cp": 2}, **THREE},
    "DP2": {"optimizer": {"overlap": True}},
}
SWITCHES: list[dict[str, dict[str, Any]]] = [
    {
        "forks": {"scope": "batch", "select": "covariance"},
        "loss": {"reduction": "official", "objective": "gspo", "clip_cov": [0.1, 0.1, 5.0]},
    },
    {
        "forks": {"scope": "minibatch", "select": "random", "horvitz_thompson": True, "normalize_by": "response"},
        "loss": {"importance_cap": 2.0, "mismatch": {"token_mask": [0.5, 2.0], "geometric_mask": [0.5, 2.0], "veto": 0.1}},
        "model": {"recompute": "full"},
    },
    {
        "forks": {"scope": "microbatch", "select": "gmts"},
        "loss": {"reduction": "seq-mean", "objective": "cispo", "kl": {"coef": 0.1}},
        "precision": {"dtype": "bf16"},
    },
    {
        "forks": {"scope": "sequence", "select": "bottom", "rest_weight": 0.5},
        "loss": {"dual_clip": 1.05, "clip_rest": [0.1, 0.1], "entropy_bonus": 0.01},
        "model": {"recompute": "selective"},
    },
    {"forks": {"select": "stapo", "stapo": [0.01, 0.5]}},
    {"forks": {"select": "prefix", "top_entropy_quantile": 0.6, "horvitz_thompson": True, "normalize_by": "response"}},
    {"forks": {"scope": "fixed", "threshold": 4.2}, "loss": {"objective": "reinforce"}, "rollout": {"fork_temperature": (0.7, 1.3, 4.3)}},
    {"forks": {"entropy_from": "current", "normalize_by": "response"}, "loss": {"objective": "sapo"}, "precision": {"dtype": "bf16"}},
]
"""Between them every scope, objective, reduction, penalty and correction, kinds of selection, both dtypes, and both ways to recompute."""


def spec_of(folder: Path, *changes: dict[str, dict[str, Any]]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {"train": {"micro_batch_tokens": 64}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}
    for change in changes:
        sections |= {name: {**sections.get(name, {}), **values} for name, values in change.items()}
    return recipe(folder, **sections)


def update(spec: Recipe, device: torch.device, before: Rig | None) -> tuple[Rig, dict[str, Any]]:
    """One step: its numbers, and of each response what a roll-out file has."""
    rig = Rig(spec, device, before)
    assert {parameter.device for chunk in rig.learner.chunks for parameter in chunk.parameters()} == {device}
    minibatches, metrics = rig.update(0)
    found = {"metrics": metrics, "weights": on_host(rig.weights())}
    if rig.mesh.is_last_stage:
        micros = list(itertools.chain(*minibatches))
        for name in ("entropy", "old_log_prob", "mask"):
            found[name] = [part for micro in micros for part in micro.by_response(getattr(micro, name), rig.mesh.cp_group)]
    return rig, found


def life(spec: Recipe, device: torch.device, folder: Path) -> dict[str, Any]:
    """What a run does: a step, parked before and after it, a checkpoint, a refit; then from the checkpoint a step and a supervised one."""
    rig = Rig(spec, device)
    learner = rig.learner
    offload = Offload(learner.model, learner.optimizer, rig.mesh.device)
    offload.to_host()
    offload.to_device()
    metrics, _ = rig.step(0)
    offload.to_host()
    learner.settle()
    refitted = on_host(dict(Bridge(learner.chunks, rig.shape, rig.mesh, 1)))
    checkpoints = Checkpoints(folder, rig.mesh, keep_last=1)
    checkpoints.save(1, learner.chunks, learner.optimizer, {"step": 1})
    resumed = Rig(spec, device, rig)
    Checkpoints(folder, rig.mesh, keep_last=1).load(1, resumed.learner.chunks, resumed.learner.optimizer)
    after, _ = resumed.step(1)
    supervised = resumed.learner.train(place(resumed.every, spec, resumed.mesh), cross_entropy)
    return {"metrics": [metrics, after, supervised], "refit": refitted, "weights": on_host(resumed.weights())}


def on_host(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in weights.items()}


def both(specs: list[Recipe], folder: Path | None = None) -> list[tuple[Any, Any]]:
    """What each recipe gives on the CPU and in the rehearsal; with a folder, the first has a whole life."""
    # as on a GPU, also on the CPU
    vocab._factor_dtype = lambda weight: weight.dtype
    policy.in_one_kernel = lambda hidden: True
    build.compiles = lambda device: True
    attention.in_one_call = lambda query: query.dtype is torch.bfloat16
    varlen.install()

    def all_of(device: torch.device, name: str) -> list[Any]:
        found, rig = [life(specs[0], device, folder / name)] if folder is not None else [], None
        for spec in specs:
            rig, numbers = update(spec, device, rig)
            found.append(numbers)
        return found

    plain = all_of(torch.device("cpu"), "plain")
    ledger = rehearse()
    rehearsed = all_of(DEVICE, "rehearsed")
    assert not ledger.of("pageable", "refused"), ledger.table()
    return list(zip(plain, rehearsed, strict=True))


def assert_same(plain: Any, rehearsed: Any) -> None:
    """NaN equals NaN."""
    assert type(plain) is type(rehearsed)
    if isinstance(plain, dict):
        assert plain.keys() == rehearsed.keys()
        for name, value in plain.items():
            assert_same(value, rehearsed[name])
    elif isinstance(plain, list):
        for one, other in zip(plain, rehearsed, strict=True):
            assert_same(one, other)
    elif isinstance(plain, torch.Tensor):
        assert torch.equal(plain, rehearsed)
    else:
        assert plain == rehearsed or (plain != plain and rehearsed != rehearsed)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.mark.slow
def test_every_switch_on_one_rank(model: Path) -> None:
    [pairs] = on_ranks(1, both, [spec_of(model, switches) for switches in SWITCHES])
    for plain, rehearsed in pairs:
        assert_same(plain, rehearsed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, model: Path, tmp_path: Path) -> None:
    """Every switch where responses or layers are split over ranks; half of them where whole ones are, and PP has both halves."""
    halves = {"PP2": SWITCHES[1::2], "PP2 VPP2": SWITCHES[::2], "DP2": SWITCHES[1::2]}
    specs = [spec_of(model, LAYOUTS[layout], switch) for switch in halves.get(layout, SWITCHES)]
    for pairs in on_ranks(2, both, specs, tmp_path):
        for plain, rehearsed in pairs:
            assert_same(plain, rehearsed)


def _thresholds() -> list[tuple[Any, Any]]:
    """Order statistics of values on the CPU and on the device, and what each says of a NaN."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, generator=generator) for n in (0, 1, 700, 300)]
    parts[2][:50], parts[3][7] = parts[2][50], -torch.inf
    with_nan = [*parts, torch.tensor([0.0, torch.nan, 1.0, torch.nan])]

    def found(device: torch.device, values: list[torch.Tensor]) -> Any:
        try:
            return top_thresholds([part.to(device) for part in values], [0.01, 0.2, 0.5, 1.0], group=None)
        except ValueError as error:
            return str(error)

    plain = [found(torch.device("cpu"), values) for values in (parts, with_nan)]
    rehearse()
    return list(zip(plain, [found(DEVICE, values) for values in (parts, with_nan)], strict=True))


def test_thresholds_are_counted_on_the_device_as_on_the_cpu() -> None:
    [[(counted, same), (error, other)]] = on_ranks(1, _thresholds)
    assert counted == same
    assert error == other and "NaN at position 1002 of the values of rank 0" in error


MOST_WAITS = 2
"""Of the host for the device, for each micro-batch of a step: scored and trained on."""


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"precision": {"dtype": "bf16"}}),
        pytest.param(2, {"parallel": {"tp": 2, "sp": True}, "model": {"recompute": "full"}}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": {"pp": 2}}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": {"cp": 2}, "loss": {"importance_cap": 2.0}, "precision": {"dtype": "bf16"}}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": {"pp": 2, "vpp": 2}, "precision": {"dtype": "bf16"}}, marks=pytest.mark.slow),
    ],
    ids=["one rank", "TP2 SP recompute", "PP2", "CP2", "PP2 VPP2"],
)
def test_the_host_hardly_waits_for_a_micro_batch_and_never_in_a_layer(world: int, changes: dict[str, dict[str, Any]], model: Path) -> None:
    for found in on_ranks(world, waits_of, spec_of(model, changes)):
        assert found.each <= MOST_WAITS, found.ledger.table()
        assert not [event for event in found.ledger.events if event.in_layer], found.ledger.table()
        assert not found.ledger.of("pageable"), found.ledger.table()


def _fused_layers_are_given() -> tuple[list[torch.Tensor], list[torch.Tensor], Ledger]:
    """What a micro-batch's fused layers are given, on the CPU and in the rehearsal, for one rank and for each of two CP ranks."""
    lengths, frequencies = [8, 24, 4, 8], torch.rand(16, generator=torch.Generator().manual_seed(1))

    def given(device: torch.device, on_device: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for cp, rank in ((1, 0), (2, 0), (2, 1)):
            places = to_device(places_of(lengths, zigzag_index(lengths, cp, rank)), device)
            packing = PackedSequences.packed(lengths, places).for_fused_layers()
            found += [packing.cu_seqlens_q, packing.cu_seqlens_kv_padded, FusedRotary(on_device)(packing)]
        return found

    plain = given(torch.device("cpu"), frequencies)
    ledger = rehearse()
    on_device = frequencies.to(DEVICE)
    with ledger.during() as noted:
        rehearsed = given(DEVICE, on_device)
    assert {tensor.device for tensor in rehearsed} == {DEVICE}
    return plain, [tensor.cpu() for tensor in rehearsed], noted


def test_what_fused_layers_are_given_is_on_the_device_without_waiting() -> None:
    """Lengths and angles. The layers themselves are Transformer Engine's kernels, which no CPU runs; the head is that of plain layers."""
    [(plain, rehearsed, noted)] = on_ranks(1, _fused_layers_are_given)
    assert_same(plain, rehearsed)
    assert not noted.of("wait", "pageable", "refused"), noted.table()


def _with_faults(spec: Recipe) -> dict[str, list[Event]]:
    """What a rehearsed step notes with each fault in it; whatever it raises is noted before."""
    ledger, found = rehearse(), {}
    for name, fault in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch, ledger.during() as noted:
            fault.plant(patch)
            with contextlib.suppress(Refused, TypeError):
                Rig(spec, DEVICE).step(0)
        found[name] = noted.events
    return found


@pytest.fixture(scope="module")
def noted(model: Path) -> dict[str, list[Event]]:
    return on_ranks(1, _with_faults, spec_of(model, {"forks": {"select": "random"}}))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, noted: dict[str, list[Event]]) -> None:
    fault = FAULTS[name]
    found = [event for event in noted[name] if event.kind == fault.kind and f"{event.place}:".startswith(f"{fault.place}:")]
    assert found, noted[name]
    assert all(event.in_layer == fault.in_layer for event in found)
