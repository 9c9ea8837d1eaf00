"""A step's metrics, the same on every rank and for every layout. Every rank must call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megafork.parallel.mesh import Mesh
from megafork.parallel.quantile import percentiles
from megafork.parallel.reduce import from_last_stage, over_tokens, over_world
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, Selection
from megafork.rl.loss import k3


def entropy_metrics(micros: list[MicroBatch], groups: ForkGroups, mesh: Mesh) -> dict[str, float]:
    """Entropy of the step's response tokens, before any update."""
    shares: dict[str, float] = {}
    sums: dict[str, Tensor | float] = {}
    if mesh.is_last_stage:
        entropy = torch.cat([micro.entropy for micro in micros])
        levels = percentiles([micro.entropy for micro in micros], (0.5, 0.8, 0.95), group=groups.tokens)
        shares = dict(zip(("entropy/p50", "entropy/p80", "entropy/p95"), levels, strict=True))
        sums = {"tokens": entropy.numel(), "entropy": entropy.double().sum(), "low": (entropy < 0.05).sum()}
    total = over_tokens(sums, mesh)
    return {
        **from_last_stage(shares, mesh),
        "entropy/mean": total["entropy"] / total["tokens"],
        "entropy/share_below_0.05": total["low"] / total["tokens"],
    }


def mismatch_metrics(micros: list[MicroBatch], forks: Sequence[tuple[Tensor, Tensor]], mesh: Mesh) -> dict[str, float]:
    """Mismatch between the engine's and the trainer's log-probs and, if `forks` is given, entropies, on scored micro-batches.

    forks: for each micro-batch, those by the trainer's entropies and those by the engine's; they are read on the last stage.
    """
    levels: dict[str, float] = {}
    sums: dict[str, Tensor | float] = {}
    worst: dict[str, Tensor | float] = {}
    if mesh.is_last_stage:
        delta = torch.cat([micro.old_log_prob - micro.rollout_log_prob for micro in micros]).double()
        found = percentiles(k3(delta).clamp(min=0.0).float(), (0.5, 0.95, 0.99), group=mesh.token_group)
        levels = dict(zip(("rollout_mismatch/kl_p50", "rollout_mismatch/kl_p95", "rollout_mismatch/kl_p99"), found, strict=True))
        sums = {"tokens": delta.numel(), "kl": (delta.exp() - 1 - delta).sum(), "k1": -delta.sum()}
        sums |= {"ratio": delta.clamp(max=300.0).exp().sum(), "square": (2.0 * delta.clamp(max=300.0)).exp().sum()}
        worst = {"delta": delta.abs().max() if delta.numel() else 0.0}
        if forks:
            apart = torch.cat([micro.entropy - micro.rollout_entropy for micro in micros]).double()
            sums["entropy"] = apart.abs().sum()
            sums["differ"] = torch.stack([(ours ^ theirs).sum() for ours, theirs in forks]).sum()
            sums["forks"] = torch.stack([ours.sum() + theirs.sum() for ours, theirs in forks]).sum()
    total = over_tokens(sums, mesh)
    tokens = max(total["tokens"], 1)
    metrics = {
        "rollout_mismatch/kl": total["kl"] / tokens,
        "rollout_mismatch/max": over_tokens(worst, mesh, "max")["delta"],
        "rollout_mismatch/k1": total["k1"] / tokens,
        "rollout_mismatch/ess": total["ratio"] ** 2 / (total["square"] or 1.0) / tokens,
        **from_last_stage(levels, mesh),
    }
    if "forks" in total:
        metrics["rollout_mismatch/entropy"] = total["entropy"] / tokens
        metrics["rollout_mismatch/mask"] = total["differ"] / max(total["forks"], 1)
    return metrics


def staleness(responses: list[Response], step: int, mesh: Mesh) -> dict[str, float]:
    """Number of steps by which the weights that sampled the tokens lag those at the start of `step`. `responses`: this rank's."""
    behind = [step - 1 - response.versions for response in responses if response.versions.numel()]
    late = torch.cat(behind).double() if behind else torch.zeros(0, dtype=torch.float64)
    steps, tokens = over_world([float(late.sum()), late.numel()], mesh)
    worst = over_world([float(late.max()) if late.numel() else 0.0], mesh, "max")[0]
    return {"staleness/mean": steps / max(tokens, 1), "staleness/max": worst}


def update_metrics(micros: list[MicroBatch], thresholds: list[Selection], updates: list[dict[str, float]], mesh: Mesh) -> dict[str, float]:
    """Metrics of the step's forks and updates: `thresholds`, one per selection; `updates`, as returned by `Learner.train`."""
    sums: dict[str, Tensor | float] = {}
    if mesh.is_last_stage:
        sums = {"entropy": sum((micro.entropy.double() * micro.fork).sum() for micro in micros)}
    selected = sum(threshold.selected for threshold in thresholds)
    forks = max(selected, 1)
    learned = max(sum(update["tokens"] for update in updates), 1)
    capped = {
        f"loss/{name}": sum(update[key] for update in updates) / learned
        for name, key in (
            ("importance", "importance"),
            ("capped_fraction", "capped"),
            ("masked_fraction", "masked"),
            ("reference_kl", "reference_kl"),
        )
        if key in updates[0]
    }
    return {
        **capped,
        "entropy/forks": over_tokens(sums, mesh)["entropy"] / forks,
        "forks/tau": sum(threshold.tau for threshold in thresholds) / len(thresholds),
        "forks/fraction": selected / max(sum(threshold.total for threshold in thresholds), 1),
        "forks/ties": sum(threshold.ties for threshold in thresholds),
        "forks/near_tau": sum(threshold.near for threshold in thresholds) / max(sum(threshold.total for threshold in thresholds), 1),
        "loss/policy": sum(update["loss"] for update in updates) / len(updates),
        "loss/clip_fraction": sum(update["clipped"] for update in updates) / learned,
        "loss/approx_kl": sum(update["kl"] for update in updates) / learned,
        "grad_norm": sum(update["grad_norm"] for update in updates) / len(updates),
        "update/tokens": sum(update["tokens"] for update in updates),
        "update/skipped": sum(update["skipped"] for update in updates),
        "lr": updates[-1]["lr"],
    }
