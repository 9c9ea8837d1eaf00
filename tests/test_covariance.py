"""Clip-Cov and KL-Cov: which tokens, how many, and the same for every split; and the reference of `loss.kl`, which returns the policy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from responses import LAYOUTS, Name, Token, by_token, joined, make_responses, name, on_layout, random_lengths, spread
from tiny import recipe, save_model
from torch import Tensor
from training import Rig

from megafork.recipe import Forks, Loss, Recipe
from megafork.rl.batch import MicroBatch
from megafork.rl.covariance import restrain
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import divergence, set_weights

RESPONSES = make_responses([*random_lengths(16), (1, 1)])
TOKENS = sum(len(r.tokens) for r in RESPONSES)


def log_probs() -> dict[Name, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name(r): -3 * torch.rand(len(r.tokens), generator=generator) for r in RESPONSES}


def restrained(micros: list[MicroBatch], groups: ForkGroups, old: dict[Name, Tensor], loss: Loss) -> tuple[dict[Token, float], ...]:
    """Weights before and after, and the factors of KL(p_old, p), of this rank's tokens."""
    for micro in micros:
        micro.old_log_prob, micro.entropy = spread(micro, old), torch.rand(len(micro.positions))
    select_forks(micros, Forks(select="all"), groups, seed=4, step=3)
    set_weights(micros, Forks(), loss, groups)
    before = [micro.weight for micro in micros]
    restrain(micros, loss, groups, seed=4, step=3)
    factors = [micro.old_kl for micro in micros if micro.old_kl is not None]
    return by_token(micros, before), by_token(micros, [m.weight for m in micros]), by_token(micros, factors) if factors else {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_chosen_tokens_are_the_same_in_every_layout(layout: str) -> None:
    old = log_probs()
    flat = torch.cat([old[name(r)] for r in RESPONSES]).double()
    advantage = torch.cat([torch.full((len(r.tokens),), r.advantage, dtype=torch.float64) for r in RESPONSES])
    scores = (flat - flat.mean()) * (advantage - advantage.mean())
    places = [(*name(r), t) for r in RESPONSES for t in range(len(r.tokens))]
    cov = dict(zip(places, scores.tolist(), strict=True))

    loss = Loss(clip_cov=(0.1, 0.2, 1.5), kl_cov=(0.05, 0.25))
    ranks = on_layout(LAYOUTS[layout], restrained, RESPONSES, old, loss)
    before, after, factors = (joined([rank[n] for rank in ranks]) for n in range(3))
    gone = {token for token in before if after[token] != before[token]}
    assert len(gone) == math.ceil(0.1 * TOKENS) < sum(0.2 <= c <= 1.5 for c in cov.values())
    assert all(after[token] == 0 and 0.2 <= cov[token] <= 1.5 for token in gone)
    highest = sorted(places, key=cov.__getitem__, reverse=True)[: math.ceil(0.05 * TOKENS)]
    assert {token for token, factor in factors.items() if factor} == set(highest)
    assert all(factors[token] == 0.25 for token in highest)
    alone = on_layout(LAYOUTS["one micro-batch"], restrained, RESPONSES, old, loss)[0]
    assert {token for token in alone[0] if alone[1][token] != alone[0][token]} == gone, "the draw is the token's"

    few = on_layout(LAYOUTS["one micro-batch"], restrained, RESPONSES, old, Loss(clip_cov=(1.0, 0.2, 1.5)))[0]
    assert {token for token in few[0] if few[1][token] == 0} == {token for token in cov if 0.2 <= cov[token] <= 1.5}
    none = on_layout(LAYOUTS["one micro-batch"], restrained, RESPONSES, old, Loss(clip_cov=(0.5, 1e6, 1e7)))[0]
    assert none[0] == none[1]


def test_estimators_agree_near_zero_and_stay_finite() -> None:
    small, large = torch.tensor([1e-3, -1e-3], dtype=torch.float64), torch.tensor([-1e4, 80.0])
    assert divergence(small, "k1").tolist() == (-small).tolist()
    for estimator in ("k2", "k3"):
        assert divergence(small, estimator).tolist() == pytest.approx([5e-7, 5e-7], rel=1e-3)
        assert divergence(large, estimator).isfinite().all()
        assert (divergence(large, estimator) > 0).all()
    p, q = (torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).log_softmax(0) for n in (1, 2))
    exact = float((p.exp() * (p - q)).sum())
    for estimator in ("k1", "k3"):
        assert float((p.exp() * divergence(q - p, estimator)).sum()) == pytest.approx(exact, rel=1e-12), "unbiased"


def _with_reference(spec: Recipe) -> tuple[bool, bool, float, float]:
    """Whether the policy is itself again after the reference was scored, and whether it has moved; its KL in two steps."""
    rig = Rig(spec)
    first = rig.update(0)[1]["loss/reference_kl"]
    before = {name: weight.clone() for name, weight in rig.weights().items()}
    minibatches, metrics = rig.update(1)
    after = {name: weight.clone() for name, weight in rig.weights().items()}
    rig.learner.score_reference([micro for mini in minibatches for micro in mini])
    same = all(torch.equal(weight, after[name]) for name, weight in rig.weights().items())
    moved = any(not torch.equal(weight, before[name]) for name, weight in after.items())
    return same, moved, first, metrics["loss/reference_kl"]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_policy_returns_bit_for_bit(tmp_path: Path, overlap: bool) -> None:
    optimizer = {"lr": 1e-2, "eps": 1e-2, "overlap": overlap}
    dtype = "fp32" if overlap else "bf16"
    spec = recipe(save_model(tmp_path / "m"), loss={"kl": {"coef": 0.05}}, optimizer=optimizer, precision={"dtype": dtype})
    for same, moved, first, second in on_ranks(2, _with_reference, spec):
        assert same and moved
        assert 0 <= first < second, "the policy moves away from its start"
