"""The objective of a step: which tokens, which loss, which optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megafork.recipe.kinds import (
    AboveOne,
    AtLeastOne,
    AtMostOne,
    BelowOne,
    CountOrZero,
    Fraction,
    InsideOne,
    Megabytes,
    NonNegative,
    Number,
    Positive,
    Section,
)
from megafork.user_code import name_problem

RULES = ("top", "bottom", "random", "all", "prefix", "gmts", "gradient", "covariance", "rsi", "stapo")
"""Selection rules by name, as in `rl/rules.py`."""
_OF_ENTROPY = ("top", "bottom")
_WITHOUT_SHARE = ("all", "rsi", "stapo")
_WITH_KNOWN_ODDS = ("random", "prefix")


class Forks(Section):
    top_entropy_quantile: Fraction = 0.2
    """rho, the share of response tokens kept for the update (under `select: prefix` on average)."""
    select: str = "top"
    """Which share is kept: highest entropy (`top`), lowest (`bottom`), `random`, the beginning of each response (`prefix`), the highest
    |A| H (`gmts`), gradient at the logits (`gradient`) or covariance of log-prob and advantage (`covariance`). Or which tokens: `all`,
    those with a relative surprisal in `rsi_interval` (`rsi`), all but spurious ones (`stapo`). Or a rule of your own as FILE.py:FUNCTION
    (docs/extending.md). Formulas: docs/algorithm.md."""
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
    rest_weight: AtMostOne = 0.0
    """Weight of the tokens that are not selected, relative to the selected ones: 0 masks them, 1 trains on all alike."""
    horvitz_thompson: bool = False
    """Divide the loss of each token by the probability with which it was selected: an unbiased estimate of the loss over all tokens. Only
    with `select: random` or `prefix`, and with `normalize_by: response`."""
    rsi_interval: Annotated[tuple[NonNegative, Positive], Field(strict=False)] | None = None
    """Least and greatest -log p / H of the tokens that `select: rsi` keeps; needed with it, and only with it."""
    stapo: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    """tau_p and q of `select: stapo`: below which probability a token is rare, and up to which quantile of their entropies rare tokens of
    responses with a positive advantage are silenced. Unset: 0.002 and 0.75, the authors'."""

    @property
    def share_with_loss(self) -> float:
        """Of the response tokens, about."""
        return 1.0 if self.rest_weight or self.select in _WITHOUT_SHARE else self.top_entropy_quantile

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
        if self.scope == "fixed" and self.select not in _OF_ENTROPY:
            raise ValueError(f"forks.select is {self.select} with forks.scope=fixed: a fixed threshold in nats selects `top` or `bottom`")
        return self

    @model_validator(mode="after")
    def _rule_has_what_it_needs(self) -> Forks:
        if ".py:" not in self.select and (problem := name_problem(self.select, RULES)):
            raise ValueError(f"forks.select is {self.select!r}: {problem}")
        if (self.select == "rsi") != (self.rsi_interval is not None):
            raise ValueError(
                f"forks.rsi_interval is {self.rsi_interval} with forks.select={self.select}: give it with select=rsi, and only with it"
            )
        if self.rsi_interval is not None and self.rsi_interval[0] > self.rsi_interval[1]:
            raise ValueError(f"forks.rsi_interval is {list(self.rsi_interval)}: the first must not exceed the second")
        if self.select == "covariance" and self.scope == "sequence":
            raise ValueError(
                "forks.select is covariance with forks.scope=sequence: all tokens of a response have the same advantage, so their "
                "covariance is 0; choose scope=minibatch"
            )
        if self.stapo is not None and self.select != "stapo":
            raise ValueError(f"forks.stapo is {list(self.stapo)} with forks.select={self.select}: only `stapo` has it; leave it out")
        return self

    @model_validator(mode="after")
    def _weights_have_one_meaning(self) -> Forks:
        if self.horvitz_thompson and self.select not in _WITH_KNOWN_ODDS:
            raise ValueError(
                f"forks.horvitz_thompson is true with forks.select={self.select}: only `random` and `prefix` select by chance; leave it out"
            )
        if self.horvitz_thompson and self.normalize_by == "selected":
            raise ValueError(
                "forks.horvitz_thompson is true with forks.normalize_by=selected: the estimate of a sum over all tokens is divided by "
                "their number; set normalize_by=response"
            )
        if self.horvitz_thompson and self.rest_weight:
            raise ValueError(f"forks.rest_weight is {self.rest_weight} with forks.horvitz_thompson: choose one of the two weights")
        if self.select == "prefix" and self.rest_weight:
            raise ValueError(f"forks.rest_weight is {self.rest_weight} with forks.select=prefix: the tokens after the cut are never scored")
        return self


Band = Annotated[tuple[AtMostOne, AtLeastOne], Field(strict=False)]
"""Bounds of a ratio, which is 1 where both policies agree."""


class Mismatch(Section):
    token_mask: Band | None = None
    """[low, high]: tokens with p_old / p_rollout outside do not count (IcePop: [0.5, 5] with `importance_cap=5`)."""
    sequence_mask: Band | None = None
    """Responses whose product of these ratios is outside do not count."""
    geometric_mask: Band | None = None
    """Responses whose geometric mean of these ratios is outside do not count."""
    veto: InsideOne | None = None
    """Responses with a token whose ratio is below this do not count (1e-4 is usual)."""

    @property
    def masks(self) -> bool:
        """Whether any token may not count."""
        return self != Mismatch()


class ReferenceKL(Section):
    coef: NonNegative = 0.0
    """beta: adds beta KL(policy, reference) at each token with a loss. The reference is the model that the run starts from. 0: no
    reference is kept."""
    rest_coef: NonNegative | None = None
    """beta of the tokens that are not selected (Archer: larger than that of the forks). Unset: as `coef`."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log p_reference - log p: k1 = -d (whose gradient averages to 0 on tokens that p drew), k2 = d^2 / 2, k3 = exp(d) - 1 - d."""

    @property
    def kept(self) -> bool:
        """Whether the reference is needed."""
        return self.coef > 0 or bool(self.rest_coef)


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
    clip_rest: Annotated[tuple[BelowOne, NonNegative], Field(strict=False)] | None = None
    """[eps_low, eps_high] of `clip` at the tokens that are not selected, which have a loss under `forks.rest_weight` (Archer: stricter than
    at the forks). Unset: as at the forks."""
    sapo_temperatures: Annotated[tuple[Positive, Positive], Field(strict=False)] = (1.0, 1.05)
    """Steepness of `sapo`'s gate for positive and for negative advantages."""
    old_log_prob: Literal["score", "rollout", "current"] = "score"
    """p_old, the denominator of the ratio: scored by the trainer at the start of the step; the roll-out's, so that the ratio also corrects
    for its older weights or other precision; or the updated policy's own, without gradient, so that the ratio is 1 (needs
    `train.minibatches: 1`)."""
    importance_cap: Positive | None = None
    """C: each token's loss is weighted by min(p_old / p_rollout, C), for roll-outs from older weights or in another precision. Unset: no
    weighting. Not with `old_log_prob: rollout`, where that is 1."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """The ratio that `importance_cap` truncates: the token's own, the product of all of its response, or their geometric mean."""
    mismatch: Mismatch = Mismatch()
    """Masks on the same ratios. What does not count has no loss and stays in its denominator; formulas: docs/algorithm.md."""
    kl: ReferenceKL = ReferenceKL()
    """Penalty on the distance from the start model."""
    entropy_bonus: NonNegative = 0.0
    """c: subtracts c H from the loss of each token that has one."""
    clip_cov: Annotated[tuple[Fraction, Number, Number], Field(strict=False)] | None = None
    """[share, low, high]: Clip-Cov takes the loss of this share of the mini-batch's tokens away, drawn among those whose covariance of
    log-prob and advantage is between low and high (its authors' code: 2e-4, 1, 5)."""
    kl_cov: Annotated[tuple[Fraction, Positive], Field(strict=False)] | None = None
    """[share, beta]: KL-Cov adds beta KL(p_old, p) to the loss of this share of the tokens, those with the highest covariance (its authors'
    code: 2e-4, 1)."""
    reduction: Literal["token-mean", "official", "seq-mean"] = "token-mean"
    """One exact mean over the mini-batch's tokens; the official code's mean per micro-batch, weighted by its number of sequences; or a mean
    per response (GRPO)."""
    expert_balance: NonNegative = 0.0
    """Coefficient of a loss that spreads each sequence's tokens over the experts of a mixture: E sum_e f_e P_e, averaged over a
    mini-batch's sequences and summed over layers (docs/algorithm.md). 0 leaves routers to the objective alone."""
    normalize_advantage: bool = True
    """Divide advantages by the group's standard deviation (Dr. GRPO: false)."""
    head_memory_mb: Megabytes = 256
    """MiB for the one [chunk, vocabulary / TP] fp32 buffer of the log-prob and entropy head."""

    @property
    def ratios_of_responses(self) -> dict[str, object]:
        """What is set of the keys that need the log-probs of all tokens of a response."""
        keys = {"importance_level": None if self.importance_level == "token" else self.importance_level}
        keys |= {f"mismatch.{key}": getattr(self.mismatch, key) for key in ("sequence_mask", "geometric_mask", "veto")}
        return {key: value for key, value in keys.items() if value is not None}

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Loss:
        if self.importance_level != "token" and self.importance_cap is None:
            raise ValueError(
                f"loss.importance_level is {self.importance_level} without loss.importance_cap: no ratio weighs the loss; set a cap"
            )
        if self.clip_rest is not None and self.objective != "clip":
            raise ValueError(
                f"loss.clip_rest is {list(self.clip_rest)} with loss.objective={self.objective}: only `clip` has it; leave it out"
            )
        if self.clip_cov is not None and self.clip_cov[1] > self.clip_cov[2]:
            raise ValueError(f"loss.clip_cov is {list(self.clip_cov)}: low must not exceed high")
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
        if self.min_lr and self.decay == "constant":
            raise ValueError(
                f"optimizer.min_lr is {self.min_lr} with optimizer.decay=constant: nothing falls to it; set decay=cosine or decay=linear, "
                "or leave min_lr out"
            )
        return self
