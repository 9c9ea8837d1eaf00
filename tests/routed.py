"""Routing that is given: drawn at random, and obeyed by transformers' routers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megafork.recipe import Recipe
from megafork.rl.batch import Response
from megafork.shape import read_shape


def given(responses: list[Response], spec: Recipe) -> list[Response]:
    """The responses with random experts, as no router would choose them, if the recipe takes those of the roll-out."""
    if spec.routing_from != "rollout":
        return responses
    shape = read_shape(Path(spec.model.path))
    moe = shape.mixture

    def drawn(response: Response) -> Tensor:
        generator = torch.Generator().manual_seed(100 * response.group + response.sample)
        order = torch.rand(response.length, shape.layers, moe.experts, generator=generator).argsort(-1)
        return order[..., : moe.per_token].to(torch.int16)

    return [replace(response, routing=drawn(response)) for response in responses]


def let_routers_be_told(model: Any) -> None:
    """Make the routers of a transformers model obey `model.routing`, [tokens but the last, layers, k]; if that is empty, they choose."""
    model.routing = torch.empty(0)
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):

            def obey(router: Any, inputs: Any, answer: Any, number: int = number) -> Any:
                if model.routing.dim() != 3:
                    return answer
                logits, _, own = answer
                experts = torch.cat([model.routing[:, number].long(), own[len(model.routing) :]])
                weights = logits.softmax(-1).gather(-1, experts)
                return logits, weights / weights.sum(-1, keepdim=True) if router.norm_topk_prob else weights, experts

            layer.mlp.gate.register_forward_hook(obey)


def chosen(model: Any, response: Response) -> Tensor:
    """What the routers of a transformers model choose for the tokens of a response: int16 [tokens but the last, layers, k]."""
    ids = torch.cat([response.prompt_tokens, response.tokens]).long()[:-1]
    model.routing = torch.empty(0)
    with torch.no_grad():
        logits = model(ids[None], output_router_logits=True).router_logits
    sparse = [hasattr(layer.mlp, "gate") for layer in model.model.layers]
    k, by_layer = model.config.num_experts_per_tok, iter(logits)
    none = torch.zeros(len(ids), k, dtype=torch.int16)
    return torch.stack([next(by_layer).topk(k, -1).indices.to(torch.int16) if one else none for one in sparse], 1)
