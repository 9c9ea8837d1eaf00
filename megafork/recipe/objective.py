"""The objective of a step: which tokens, which loss, which optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megafork.recipe.kinds import AboveOne, BelowOne, CountOrZero, Fraction, Megabytes, NonNegative, Positive, Section


class Forks(Section):
    top_entropy_quantile: Fraction = 0.2
    """rho, the share of response tokens kept for the update."""
    select: Literal["top", "bottom", "random", "all"] = "top"
    """Which share is kept: highest entropy, lowest, random, or every token."""
    scope: Literal["batch", "minibatch", "microbatch", "sequence", "fixed"] = "minibatch"
    """Tokens that share one threshold. Given the same entropies, `batch` and `minibatch` select the same tokens under every parallel
    layout; `fixed` uses `threshold`."""
    threshold: NonNegative | None = None
    """tau in nats for `scope: fixed` (the paper's 0.672)."""
    entropy_from: Literal["old", "current", "rollout"] = "old"
    """Entropies of the policy at the start of the step (free), or before each mini-batch (one more forward), or of the roll-out, which the
    engine returns beside the log-probs. With `rollout` and `loss.old_log_prob` other than `score` there is no scoring pass."""
    normalize_by: Literal["selected", "response"] = "selected"
    """The loss's denominator counts the selected tokens, or all response tokens."""

    @model_validator(mode="after")
    def _fixed_needs_threshold(self) -> Forks:
        if (self.scope == "fixed") != (self.threshold is not None):
            raise ValueError(
                f"forks.threshold is {self.threshold} with forks.scope={self.scope}: give a threshold with scope=fixed, and only with it"
            )
        if self.scope == "batch" and self.entropy_from == "current":
            raise ValueError(
                "forks.entropy_from is current with forks.scope=batch: one threshold for the whole step can only use the policy at its "
                "start; choose scope=minibatch, or entropy_from=old"
            )
        if self.scope == "fixed" and self.select in ("random", "all"):
            raise ValueError(f"forks.select is {self.select} with forks.scope=fixed: a fixed threshold selects `top` or `bottom`")
        return self


class Loss(Section):
    objective: str = "clip"
    """`clip` (PPO's with clip-higher, as the paper), `gspo` (sequence ratio), `cispo` (clipped weight), `sapo` (soft gate), `reinforce`
    (no ratio), or a function of your own as FILE.py:FUNCTION (docs/extending.md). Formulas: docs/algorithm.md."""
    clip_low: BelowOne = 0.2
    """eps_low: `clip`, `gspo` and `cispo` clip the ratio below at 1 - eps_low (GSPO's authors: 3e-4)."""
    clip_high: NonNegative = 0.28
    """eps_high: they clip it above at 1 + eps_high (GSPO's authors: 4e-4)."""
    dual_clip: AboveOne | None = None
    """c: with a negative advantage the loss of `clip` is at most c |A| (official code: 10)."""
    sapo_temperatures: Annotated[tuple[Positive, Positive], Field(strict=False)] = (1.0, 1.05)
    """Steepness of `sapo`'s gate for positive and for negative advantages."""
    old_log_prob: Literal["score", "rollout", "current"] = "score"
    """p_old, the denominator of the ratio: scored by the trainer at the start of the step; the roll-out's, so that the ratio also corrects
    for its older weights or other precision; or the updated policy's own, without gradient, so that the ratio is 1 (needs
    `train.minibatches: 1`)."""
    importance_cap: Positive | None = None
    """C: each token's loss is weighted by min(p_old / p_rollout, C), for roll-outs from older weights or in another precision. Unset: no
    weighting. Not with `old_log_prob: rollout`, where that is 1."""
    reduction: Literal["token-mean", "official", "seq-mean"] = "token-mean"
    """One exact mean over the mini-batch's tokens; the official code's mean per micro-batch, weighted by its number of sequences; or a mean
    per response (GRPO)."""
    normalize_advantage: bool = True
    """Divide advantages by the group's standard deviation (Dr. GRPO: false)."""
    head_memory_mb: Megabytes = 256
    """MiB for the one [chunk, vocabulary / TP] fp32 buffer of the log-prob and entropy head."""

    @model_validator(mode="after")
    def _dual_clip_bounds_a_clip(self) -> Loss:
        if self.dual_clip is not None and self.objective != "clip":
            raise ValueError(f"loss.dual_clip is {self.dual_clip} with loss.objective={self.objective}: only `clip` has it; leave it out")
        return self


class Optimizer(Section):
    lr: Positive = 1e-6
    """Peak learning rate."""
    warmup_steps: CountOrZero = 0
    """Optimizer updates over which the rate grows from 0 to `lr`."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule after the warm-up, down to `min_lr` at the last update."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a decay."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay."""
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    grad_clip: NonNegative = 1.0
    """Maximum global gradient norm; 0 turns clipping off."""
    overlap: bool = False
    """Overlap the reduction of gradients with the backward, and the gathering of updated weights with the next forward."""

    @model_validator(mode="after")
    def _rate_falls(self) -> Optimizer:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr is {self.min_lr} but optimizer.lr is {self.lr}: a decay ends at min_lr, choose a smaller one"
            )
        return self
