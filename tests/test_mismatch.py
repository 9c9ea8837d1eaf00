"""Corrections for roll-outs from another policy, against their formulas in float64 for every split; and the metrics of the mismatch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import on_ranks
from reference import correction
from responses import LAYOUTS, Name, Token, by_token, joined, make_responses, name, on_layout, random_lengths, spread
from tiny import recipe, save_model
from torch import Tensor
from training import Rig, responses

from megafork.recipe import Forks, Loss
from megafork.rl import mismatch
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import policy_loss, set_weights
from megafork.rl.mismatch import set_response_corrections
from megafork.rl.packing import pack

RESPONSES = make_responses([*random_lengths(14), (1, 1), (5, 40)])
KEYS: list[dict[str, Any]] = [
    {},
    {"importance_cap": 1.5},
    {"importance_cap": 2.0, "mismatch": {"token_mask": [0.5, 2.0]}},
    {"mismatch": {"token_mask": [0.5, 2.0]}},
    {"importance_cap": 2.0, "importance_level": "sequence"},
    {"importance_cap": 1.05, "importance_level": "geometric", "mismatch": {"sequence_mask": [0.4, 2.5]}},
    {"mismatch": {"geometric_mask": [0.9, 1.1]}},
    {"mismatch": {"veto": 0.4}},
    {"mismatch": {"veto": 0.3, "geometric_mask": [0.7, 1.4], "token_mask": [0.2, 4.0]}},
]
CASES = [Loss.model_validate(keys) for keys in KEYS]


def drifted() -> dict[Name, Tensor]:
    """Log-probs of the trainer, fp32."""
    generator = torch.Generator().manual_seed(6)
    return {name(r): r.log_probs + 0.35 * torch.randn(len(r.tokens), generator=generator) for r in RESPONSES}


def factor_of(micro: MicroBatch, loss: Loss) -> Tensor | None:
    everywhere = torch.arange(len(micro.positions))
    return mismatch.correction(micro.old_log_prob - micro.rollout_log_prob, micro.response_correction, everywhere, loss)


def correct(micros: list[MicroBatch], groups: ForkGroups, log_probs: dict[Name, Tensor]) -> list[dict[Token, float] | None]:
    """This rank's factors by token, case by case."""
    found: list[dict[Token, float] | None] = []
    for micro in micros:
        micro.old_log_prob = spread(micro, log_probs)
    for case in CASES:
        set_response_corrections(micros, case, groups.context)
        factors = [factor for micro in micros if (factor := factor_of(micro, case)) is not None]
        found.append(by_token(micros, factors) if factors else None)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_correction_equals_its_formula_in_every_layout(layout: str) -> None:
    log_probs = drifted()
    ranks = on_layout(LAYOUTS[layout], correct, RESPONSES, log_probs)
    assert all(rank[0] is None for rank in ranks), "nothing is multiplied by default"
    for n, case in enumerate(CASES[1:], 1):
        found = joined([rank[n] or {} for rank in ranks])
        wanted: dict[Token, float] = {}
        for r in RESPONSES:
            factors = correction(case, (log_probs[name(r)].double() - r.log_probs.double()).tolist())
            wanted |= {(*name(r), t): f for t, f in enumerate(factors.tolist())}
        assert found == pytest.approx(wanted, rel=1e-5, abs=0), case
        if case.mismatch.masks:
            assert 0 < sum(f == 0 for f in found.values()) < len(found), f"{case} masks some"


def test_what_does_not_count_has_no_loss_and_stays_in_the_denominator() -> None:
    micro, plain = pack(RESPONSES), pack(RESPONSES)
    loss = Loss.model_validate({"mismatch": {"token_mask": [0.8, 1.25]}})
    shares = []
    for batch, spec in ((micro, loss), (plain, Loss())):
        batch.old_log_prob = spread(batch, drifted())
        batch.entropy = torch.rand(len(batch.positions), generator=torch.Generator().manual_seed(0))
        set_response_corrections([batch], spec, None)
        select_forks([batch], Forks(top_entropy_quantile=0.5), ForkGroups(), seed=0, step=0)
        set_weights([batch], Forks(), spec, ForkGroups())
        value, report = policy_loss(batch.old_log_prob[batch.selected] + 0.1, batch, loss=spec)
        shares.append((value, report))
    assert torch.equal(micro.weight, plain.weight)
    (masked, report), (whole, bare) = shares
    factor = factor_of(micro, loss)
    assert factor is not None
    out = factor[micro.selected] == 0
    assert 0 < int(out.sum()) == int(report["masked"]) < len(out)
    assert torch.equal(masked[~out], whole[~out]) and not masked[out].any()
    assert "masked" not in bare


def _metrics(model: Any) -> dict[str, float]:
    rig = Rig(recipe(model, parallel={"cp": 2}, loss={"mismatch": {"token_mask": [0.5, 2.0]}, "importance_cap": 2.0}))
    _, metrics = rig.update(0)
    return metrics


def test_metrics_of_the_mismatch(tmp_path: Any) -> None:
    """k1, k3 and its percentiles, the effective sample size and the share that does not count, against transformers in float64."""
    import transformers

    folder = save_model(tmp_path / "m")
    first, second = on_ranks(2, _metrics, folder)
    assert repr(first) == repr(second)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    deltas = []
    with torch.no_grad():
        for r in responses():
            logits = model(torch.cat([r.prompt_tokens, r.tokens]).long()[None]).logits[0, len(r.prompt_tokens) - 1 : -1]
            deltas.append(logits.log_softmax(-1).gather(-1, r.tokens.long()[:, None])[:, 0] - r.log_probs)
    delta = torch.cat(deltas)
    k3 = (delta.exp() - 1 - delta).sort().values
    wanted = {"kl": k3.mean(), "k1": -delta.mean(), "ess": delta.exp().sum() ** 2 / (2 * delta).exp().sum() / len(delta)}
    wanted |= {f"kl_p{p}": k3[math.ceil(p * len(k3) / 100) - 1] for p in (50, 95, 99)}
    for key, value in wanted.items():
        assert first[f"rollout_mismatch/{key}"] == pytest.approx(float(value), rel=1e-4), key
    assert 0 < first["loss/masked_fraction"] < 1
    assert 0 < first["loss/capped_fraction"] + first["loss/masked_fraction"] < 1
