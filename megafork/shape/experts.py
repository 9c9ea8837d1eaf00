"""Reads the experts of a mixture from config.json, as transformers and vLLM read Qwen3-MoE's."""

from __future__ import annotations

from megafork.shape.config import Keys
from megafork.shape.model import Mixture

KEYS = {
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef", "output_router_logits"),
}
"""Keys of config.json that only a family with experts has."""
_MOST_EXPERTS = 1 << 16
_LARGEST_SIZE = 1 << 24


def read_mixture(config: Keys, layers: int) -> Mixture:
    """The experts, with transformers' defaults for missing keys. Raises RecipeError.

    Two keys are checked and not used: `output_router_logits` and `router_aux_loss_coef` add transformers' own balancing loss to its loss,
    and change no logits; `loss.expert_balance` is megafork's.
    """
    experts = _experts(config)
    per_token = config.whole("num_experts_per_tok", largest=_MOST_EXPERTS, default=8)
    normalized = config.flag("norm_topk_prob", default=False)
    if per_token > experts:
        raise config.error("num_experts_per_tok", f"the model has {experts} experts; give at most as many")
    if per_token == 1 and normalized:
        raise config.error(
            "num_experts_per_tok", "with norm_topk_prob the weight of a token's one expert is always 1, and no router learns"
        )
    config.flag("output_router_logits", default=False)
    if type(config.values.get("router_aux_loss_coef", 0.001)) is not float:
        raise config.error("router_aux_loss_coef", "transformers reads only a number with a decimal point, such as 0.001")
    return Mixture(
        experts=experts,
        per_token=per_token,
        ffn=config.whole("moe_intermediate_size", largest=_LARGEST_SIZE, default=768),
        normalized=normalized,
        layers=_sparse_layers(config, layers),
    )


def _experts(config: Keys) -> int:
    """transformers 5 writes `num_local_experts`, published models have `num_experts`; it takes either."""
    told = {config.whole(key, largest=_MOST_EXPERTS) for key in ("num_experts", "num_local_experts") if key in config}
    if len(told) > 1:
        raise config.error("num_experts", f"its num_local_experts is {config.values['num_local_experts']}; delete the wrong one of the two")
    return told.pop() if told else 128


def _sparse_layers(config: Keys, layers: int) -> tuple[int, ...]:
    dense = config.without_null("mlp_only_layers").values.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(layer) is not int or not 0 <= layer < layers for layer in dense):
        raise config.error("mlp_only_layers", f"must be a list of layers of the model, from 0 to {layers - 1}")
    every = config.whole("decoder_sparse_step", largest=_LARGEST_SIZE, default=1)
    sparse = tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0)
    if not sparse:
        raise config.error(
            "decoder_sparse_step", "with mlp_only_layers it leaves no layer with experts; give a dense model as Qwen3ForCausalLM"
        )
    return sparse
