"""Transformer Engine's modules built without a GPU: their parameters, names and states are real, and only their kernels cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from megafork.model.build import PolicyConfig, build_chunks
from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.shape import Shape

needs_te = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed")


def build_fused(shape: Shape, config: PolicyConfig, mesh: Mesh) -> list[Policy]:
    """The fused model of `build_policy`, on the CPU."""
    with _without_gpu():
        return build_chunks(shape, config, mesh, fused=True)


@contextmanager
def _without_gpu() -> Iterator[None]:
    """The constructors of Transformer Engine's modules ask only whether there is a GPU."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    original = TransformerEngineBaseModule.__init__

    def construct(self: TransformerEngineBaseModule, *args: object, **kwargs: object) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            original(self, *args, **kwargs)

    with mock.patch.object(TransformerEngineBaseModule, "__init__", construct):
        yield
