"""Remarks printed in addition to a step's numbers, and reasons to end a run before its last step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megafork.recipe import Forks, Recipe

MISMATCH = {"fp32": 1e-4, "bf16": 0.01, "fp8": 0.05}
"""KL between roll-out and trainer, nats per token, attributable to a precision: several times the KL measured at equal weights."""


@dataclass
class Remarks:
    """Remarks on each step, the same on every rank."""

    recipe: Recipe
    stop: str | None = None
    """Why the run should end now, as further steps would not train the model."""
    _empty: int = 0
    """Consecutive steps without a token to learn from."""
    _error: str | None = None

    def after(self, metrics: Mapping[str, float | None], *, first: bool, error: str | None, example: str) -> Iterator[str]:
        """Remarks on a step; sets `stop`. `first`: first in this process. `error`: why a response was not judged. `example`: a response."""
        if first and metrics.get("entropy/p80") is not None:
            low, p80 = metrics["entropy/share_below_0.05"], metrics["entropy/p80"]
            yield f"{low:.0%} of the tokens are under 0.05 nats, the 80th percentile is {p80:.2f}"
        failed, sampled = int(metrics["reward/errors"] or 0), int(metrics["sampling/responses"] or 0)
        if error is not None and error != self._error:
            self._error = error
            yield f"{failed} responses could not be judged and count as wrong: {error}"
        if failed == sampled:
            self.stop = all_failed(sampled, error)
        empty = _why_empty(metrics, self.recipe)
        self._empty = 0 if empty is None else self._empty + 1
        if self._empty == 1:
            yield f"nothing to learn from: {empty}" + ("" if metrics["sampling/with_advantage"] else f"; for example, {example}")
        if self._empty >= self.recipe.rollout.max_empty_steps:
            self.stop = self.stop or f"{self._empty} steps in a row had nothing to learn from (rollout.max_empty_steps): {empty}"


def all_failed(responses: int, error: str | None) -> str:
    return f"the verifier failed on all {responses} responses ({error}): fix reward.verifier, or the rows that it reads"


def _why_empty(metrics: Mapping[str, float | None], recipe: Recipe) -> str | None:
    """Why a step had nothing to learn from, and what to change. None if it had."""
    if not metrics["sampling/with_advantage"]:
        return _why_no_advantage(metrics["accuracy/mean"] or 0.0)
    if metrics.get("update/tokens") == 0:
        return f"forks.select={recipe.forks.select} selects no token{_why_none(recipe.forks, metrics)}"
    if metrics.get("loss/masked_fraction") == 1:
        return "every token that has a loss is outside the bounds of loss.mismatch; widen them, or leave loss.mismatch out"
    return None


def _why_none(forks: Forks, metrics: Mapping[str, float | None]) -> str:
    if forks.threshold is not None:
        half, most = metrics["entropy/p50"], metrics["entropy/p95"]
        levels = f"half of the entropies are up to {half:.3g} nats, 95% up to {most:.3g}"
        return f"; {levels}: choose another forks.threshold than {forks.threshold:g}"
    return f" within forks.rsi_interval={list(forks.rsi_interval)}: widen it" if forks.rsi_interval else ""


def _why_no_advantage(accuracy: float) -> str:
    if accuracy == 0.0:
        return "every response is wrong; look at the answers and the verifier, warm-start the model, or choose easier prompts"
    if accuracy == 1.0:
        return "every response is right; choose harder prompts"
    return "no prompt has both right and wrong responses; raise rollout.samples, or choose prompts of a different difficulty"


def mismatch(metrics: Mapping[str, float], recipe: Recipe) -> str | None:
    """Why not to train on the first step: at equal weights, roll-out and trainer differ by more than precision explains. None if fine."""
    precision = recipe.precision
    kind = "fp8" if precision.rollout_fp8 or precision.train_fp8 or recipe.rollout.cache_is_quantised else precision.dtype
    limit = MISMATCH[kind] if recipe.rollout.max_mismatch is None else recipe.rollout.max_mismatch
    kl = metrics["rollout_mismatch/kl"]
    if kl <= limit:  # False for NaN
        return None
    return (
        f"at equal weights vLLM's log-probs differ from the trainer's by a KL of {kl:.3g} nats per token (one of them by "
        f"{metrics['rollout_mismatch/max']:.3g}), more than {kind} explains ({limit:g}): they do not compute the same model, and nothing "
        "was trained. Check config.json (RoPE, norms) and the versions of vLLM and megatron-core; rollout.max_mismatch sets the limit"
    )
