"""Chooses the roll-out engine and the source of its weights. How to add another engine: docs/extending.md."""

from __future__ import annotations

from collections.abc import Callable

from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe
from megafork.rollout.client import Limits
from megafork.rollout.colocated import ColocatedEngine
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Engine
from megafork.rollout.server import ServerEngine
from megafork.shape import Shape
from megafork.weights.policy_weights import WholeWeights
from megafork.weights.refit import Bridge

BuildEngine = Callable[[Recipe, Mesh, list[Policy], Shape], Engine]


def build_engine(recipe: Recipe, mesh: Mesh, chunks: list[Policy], shape: Shape) -> Engine:
    """The recipe's engine, to be refitted from `chunks`. Every rank must call. Raises RecipeError for unsuitable servers."""
    config, spec = EngineConfig.of(recipe), recipe.rollout
    if spec.servers:
        limits = Limits(in_flight=spec.max_running, request_s=spec.request_limit_s, server_s=spec.server_limit_s)
        return ServerEngine(config, mesh, WholeWeights(chunks, shape, mesh), spec.servers, limits)
    bridge = Bridge(chunks, shape, mesh, spec.tp, whole_experts=spec.whole_experts)
    return ColocatedEngine(config, mesh, bridge, bridge.metrics)
