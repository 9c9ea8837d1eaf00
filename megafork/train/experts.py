"""Metrics of the routers of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megafork.model.experts import routers
from megafork.model.policy import Policy
from megafork.parallel.mesh import Mesh


def expert_metrics(chunks: list[Policy], mesh: Mesh) -> dict[str, float]:
    """How the tokens of the updates since the last call were spread over the experts; {} for a dense model. Every rank must call.

    Every layer with experts counts alike: `share_max` and `share_min` are the largest and smallest share of a layer's choices that fell on
    one expert, `entropy` is that of the shares in nats, averaged over layers (log of the number of experts if all are used alike), `dead`
    counts the experts of all layers that no token chose. `replaced` is the share of choices that the routers would have made otherwise
    (`rollout.routing`), `balance_loss` the loss of `loss.expert_balance`.
    """
    config: Any = chunks[0].config
    if config.num_moe_experts is None:
        return {}
    seen = torch.zeros(config.num_layers, config.num_moe_experts + 2, dtype=torch.float64, device=mesh.device)
    for chunk in chunks:
        for layer, router in routers(chunk).items():
            seen[layer] += router.seen
            router.seen.zero_()
    dist.all_reduce(seen)  # with experts, the TP ranks hold different tokens too
    seen = seen.cpu()
    counts = seen[:, :-2]
    counts = counts[counts.sum(1) > 0]
    if not len(counts):
        return {}
    shares = counts / counts.sum(1, keepdim=True)
    return {
        "experts/share_max": float(shares.max()),
        "experts/share_min": float(shares.min()),
        "experts/entropy": float(torch.special.entr(shares).sum(1).mean()),
        "experts/dead": float((counts == 0).sum()),
        "experts/replaced": float(seen[:, -2].sum() / counts.sum()),
        "experts/balance_loss": float(seen[:, -1].sum()),
    }
