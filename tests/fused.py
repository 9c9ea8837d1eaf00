"""Transformer Engine's modules built without a GPU: their parameters, names and states are real, and only their kernels cannot run."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import te_kernels
import torch
import training
from megatron.core.dist_checkpointing.mapping import ShardedObject
from tiny import recipe

from megafork.model.build import PolicyConfig, build_chunks
from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Recipe
from megafork.shape import Shape, read_shape
from megafork.train.learner import Learner
from megafork.weights.checkpoint import Checkpoints, _weights
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import export_policy, load_policy, local_parameters
from megafork.weights.refit import Bridge

needs_te = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed")


def build_fused(shape: Shape, config: PolicyConfig, mesh: Mesh) -> list[Policy]:
    """The fused model of `build_policy`, on the CPU."""
    with _without_gpu():
        return build_chunks(shape, config, mesh, fused=True)


def train_fused() -> None:
    """Make `training` train fused layers in place of plain ones, with their kernels played by torch."""
    te_kernels.play()
    training.build_policy = build_fused


@contextmanager
def _without_gpu() -> Iterator[None]:
    """The constructors of Transformer Engine's modules ask only whether there is a GPU; Megatron's dispatcher puts numbers on it."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    arange = torch.arange

    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        return arange(*args, **{**kwargs, "device": "cpu"})

    original = TransformerEngineBaseModule.__init__

    def construct(self: TransformerEngineBaseModule, *args: object, **kwargs: object) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            original(self, *args, **kwargs)

    with mock.patch.object(TransformerEngineBaseModule, "__init__", construct), mock.patch.object(torch, "arange", on_cpu):
        yield


KINDS = {"plain": (False, False), "fused": (True, False), "fp8": (True, True)}
"""Whether layers are fused, and whether they train in FP8."""


def spec_of(folder: Path, layout: dict[str, Any], *, fp8: bool = False) -> Recipe:
    return recipe(folder, parallel=layout, precision={"dtype": "bf16", "train_fp8": fp8})


def model_of(kind: str, folder: Path, layout: dict[str, Any]) -> tuple[list[Policy], Shape, Mesh, Recipe]:
    fused, fp8 = KINDS[kind]
    spec, shape = spec_of(folder, layout, fp8=fp8), read_shape(folder)
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    config = PolicyConfig.of(spec)
    return build_fused(shape, config, mesh) if fused else build_chunks(shape, config, mesh, fused=False), shape, mesh, spec


def described(chunks: list[Policy]) -> dict[str, tuple[Any, ...]]:
    """What the optimizer, DDP and gradient norm read of each parameter. Transformer Engine is not told how experts are split: nothing
    reads their `partition_dim`."""
    marks = ("tensor_model_parallel", "sequence_parallel", "shared")
    return {
        name: (
            tuple(parameter.shape),
            parameter.dtype,
            getattr(parameter, "allreduce", True),
            getattr(parameter, "partition_dim", 0) if ".experts." not in name else None,
            *(getattr(parameter, mark, None) or None for mark in marks),
        )
        for name, parameter in local_parameters(chunks).items()
    }


def saved(chunks: list[Policy], mesh: Mesh) -> set[tuple[Any, ...]]:
    """Key and place of each part of a checkpoint."""
    parts = itertools.chain(*(_weights(chunk, mesh).values() for chunk in chunks))
    return {(type(part).__name__, part.key, getattr(part, "global_shape", 0), getattr(part, "global_offset", 0)) for part in parts}


def check_same_model(folder: Path, layout: dict[str, Any]) -> None:
    """The fused model has the parameters, marks and checkpoint of the plain one; it loads a folder, and exports and refits it unchanged."""
    plain, shape, mesh, _ = model_of("plain", folder, layout)
    source = HuggingFaceWeights(folder)
    wanted = {name: source.read(name, (0, source.shape(name)[0])) for name in source.names()}
    for kind in ("fused", "fp8"):
        chunks, shape, mesh, _ = model_of(kind, folder, layout)
        assert described(chunks) == described(plain)
        assert saved(chunks, mesh) == saved(plain, mesh)
        load_policy(chunks, source, shape, mesh)
        for found in (dict(export_policy(chunks, shape, mesh)), dict(Bridge(chunks, shape, mesh, 1))):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def layer_names(folder: Path) -> list[set[str]]:
    """Names of the parameters of each layer of the fused model."""
    [chunk], *_ = model_of("fused", folder, {})
    return [{name for name, _ in layer.named_parameters()} for layer in chunk.decoder.layers]


def learner_of(kind: str, folder: Path, layout: dict[str, Any]) -> tuple[Learner, Shape]:
    chunks, shape, mesh, spec = model_of(kind, folder, layout)
    for module in (module for chunk in chunks for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")):
        assert not module.fuse_wgrad_accumulation, "before DDP there is nothing to add to"
        if kind == "fp8":  # as after a forward in FP8: its settings are in its state
            from transformer_engine.common.recipe import Float8BlockScaling

            module.fp8_meta |= {"fp8_checkpoint": True, "recipe": Float8BlockScaling()}
            assert module.get_extra_state().numel()
    for parameter in local_parameters(chunks).values():
        parameter.data.zero_()
    learner = Learner(chunks, spec, mesh, updates=10)
    assert all(getattr(module, "fuse_wgrad_accumulation", True) for chunk in chunks for module in chunk.modules())
    return learner, shape


def states(learner: Learner) -> list[dict[str, torch.Tensor]]:
    """The optimizer's part of each parameter; with expert parallelism, experts have an optimizer of their own."""
    inner = learner.optimizer.chained_optimizers
    held = [(one, parameter) for one in inner for parameter in one.model_param_group_index_map]
    return [one._get_main_param_and_optimizer_states(parameter) for one, parameter in held]


def save(kind: str, model: Path, layout: dict[str, Any], folder: Path) -> None:
    """A checkpoint whose moments are known multiples of its weights."""
    learner, shape = learner_of(kind, model, layout)
    load_policy(learner.chunks, HuggingFaceWeights(model), shape, learner.mesh)
    learner.optimizer.reload_model_params()
    parts = itertools.chain(*(_weights(chunk, learner.mesh).values() for chunk in learner.chunks))
    assert not any(isinstance(part, ShardedObject) and part.data is not None for part in parts), "no pickled settings"
    for state in states(learner):
        state["exp_avg"].copy_(2 * state["param"])
        state["exp_avg_sq"].copy_(state["param"].square())
    Checkpoints(folder, learner.mesh, keep_last=2).save(1, learner.chunks, learner.optimizer, {"kind": kind})


def load(kind: str, model: Path, layout: dict[str, Any], folder: Path) -> str:
    learner, shape = learner_of(kind, model, layout)
    state = Checkpoints(folder, learner.mesh, keep_last=2).load(1, learner.chunks, learner.optimizer)
    source = HuggingFaceWeights(model)
    for name, tensor in export_policy(learner.chunks, shape, learner.mesh):
        assert torch.equal(tensor, source.read(name, (0, tensor.size(0)))), name
    for moments in states(learner):
        assert moments["param"].count_nonzero()
        assert torch.equal(moments["exp_avg"], 2 * moments["param"])
        assert torch.equal(moments["exp_avg_sq"], moments["param"].square())
    return state["kind"]
