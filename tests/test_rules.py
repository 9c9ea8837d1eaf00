"""Selection rules against their formulas in float64, for every split of the same responses; weights that make a sample unbiased."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import by_rule
from responses import LAYOUTS, Layout, Name, Token, by_token, joined, make_responses, micro_batches, name, on_layout, random_lengths, spread
from torch import Tensor

from megafork.recipe import Forks, Loss, Recipe, RecipeError
from megafork.rl import draws, prefix
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, Selection, select_forks
from megafork.rl.loss import set_weights
from megafork.rl.packing import pack
from megafork.rl.rules import RULES, Candidates, check_rule, rsi

RESPONSES = make_responses([*random_lengths(17), (1, 1), (5, 1)])


def forks(**keys: Any) -> Forks:
    return Forks.model_validate(keys)


CASES = [
    forks(select="gmts"),
    forks(select="gradient"),
    forks(select="covariance", top_entropy_quantile=0.3),
    forks(select="rsi", rsi_interval=(0.3, 1.5)),
    forks(select="stapo", stapo=(0.2, 0.5)),
    forks(select="stapo", stapo=(0.5, 1.0), scope="sequence"),
    forks(select="gmts", scope="sequence", top_entropy_quantile=0.5),
    forks(select="random", rest_weight=0.25),
    forks(select="random", horvitz_thompson=True, normalize_by="response", scope="sequence"),
]


def scores_of(responses: list[Response]) -> tuple[dict[Name, Tensor], dict[Name, Tensor]]:
    """Entropies and log-probs of the responses' tokens, fp32."""
    generator = torch.Generator().manual_seed(3)
    entropies = {name(r): 2.5 * torch.rand(len(r.tokens), generator=generator) for r in responses}
    return entropies, {name(r): -4 * torch.rand(len(r.tokens), generator=generator) for r in responses}


def select(
    micros: list[MicroBatch], groups: ForkGroups, entropies: dict[Name, Tensor], log_probs: dict[Name, Tensor]
) -> list[tuple[Selection, dict[Token, bool], dict[Token, float]]]:
    """Each case's selection; the masks and the weights of this rank's tokens."""
    for micro in micros:
        micro.entropy, micro.old_log_prob = spread(micro, entropies), spread(micro, log_probs)
    found = []
    for case in CASES:
        selection = select_forks(micros, case, groups, seed=3, step=2)
        set_weights(micros, case, Loss(reduction="seq-mean"), groups)
        found.append((selection, by_token(micros, [m.fork for m in micros]), by_token(micros, [m.weight for m in micros])))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_equals_its_formula_in_every_layout(layout: str) -> None:
    entropies, log_probs = scores_of(RESPONSES)
    ranks = on_layout(LAYOUTS[layout], select, RESPONSES, entropies, log_probs)
    for n, case in enumerate(CASES):
        masks, weights = joined([rank[n][1] for rank in ranks]), joined([rank[n][2] for rank in ranks])
        assert len({repr(rank[n][0]) for rank in ranks}) == 1
        assert (ranks[0][n][0].selected, ranks[0][n][0].total) == (sum(masks.values()), len(masks))
        assert math.isnan(ranks[0][n][0].tau)
        if case.select == "random":
            assert 0 < sum(masks.values()) < len(masks)
        else:
            sharing = [[r] for r in RESPONSES] if case.scope == "sequence" else [RESPONSES]
            wanted = dict(chain(*(by_rule(case, part, entropies, log_probs).items() for part in sharing)))
            assert masks == {(*key, t): bool(m) for key, mask in wanted.items() for t, m in enumerate(mask)}, case
            assert 0 < sum(masks.values()) < len(masks), case
        for r in RESPONSES:
            mine = [masks[(*name(r), t)] for t in range(len(r.tokens))]
            emphases = [1.0 if m else case.rest_weight for m in mine]
            denominator = sum(emphases) or 1.0
            if case.horvitz_thompson:
                emphases, denominator = [m * len(mine) / sum(mine) for m in mine], len(mine)
            for t, emphasis in enumerate(emphases):
                assert weights[(*name(r), t)] == pytest.approx(emphasis / denominator / len(RESPONSES), rel=1e-6), case


def test_a_rest_weight_of_one_is_every_token_to_the_last_bit() -> None:
    entropies, _ = scores_of(RESPONSES)
    for reduction in ("token-mean", "official", "seq-mean"):
        weights = []
        for case in (forks(rest_weight=1.0), forks(select="all")):
            micros = [pack(members) for members in micro_batches(Layout(budget=30), RESPONSES)[0]]
            for micro in micros:
                micro.entropy = spread(micro, entropies)
            select_forks(micros, case, ForkGroups(), seed=0, step=0)
            assert all(micro.mask.all() for micro in micros)
            set_weights(micros, case, Loss.model_validate({"reduction": reduction}), ForkGroups())
            weights.append(torch.cat([micro.weight for micro in micros]))
        assert torch.equal(*weights)


# ---- unbiased samples


def recipe(**keys: Any) -> Recipe:
    sections = {"model": {"path": "m"}, "data": {"train": "d"}, "forks": keys}
    return Recipe.model_validate(sections)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
@pytest.mark.parametrize(("chosen", "share"), [("random", 0.2), ("prefix", 0.5), ("prefix", 0.8)])
def test_horvitz_thompson_weights_estimate_the_loss_over_all_tokens(chosen: str, share: float, reduction: Any) -> None:
    """Four values that depend on the token's place alone, in thousand copies each: within five standard errors of all tokens' sum."""
    lengths, copies = (7, 3, 1, 12), 1000
    responses = make_responses([(1, n) for n in lengths * copies])
    spec = recipe(select=chosen, top_entropy_quantile=share, horvitz_thompson=True, normalize_by="response")
    micro = pack([prefix.cut(r, spec, step=5) for r in responses])
    micro.entropy = torch.zeros(len(micro.positions))
    selection = select_forks([micro], spec.forks, ForkGroups(), seed=spec.run.seed, step=5)
    assert selection.total == copies * sum(lengths)
    included = sum(1 - (t / n) ** (share / (1 - share)) for n in lengths for t in range(n)) / sum(lengths)
    assert selection.selected / selection.total == pytest.approx(share if chosen == "random" else included, abs=0.02)
    set_weights([micro], spec.forks, Loss(reduction=reduction), ForkGroups())

    place = torch.arange(12.0, dtype=torch.float64)
    value = 1.0 + place * (place - 5.0) / 10.0
    terms = torch.zeros(len(responses), dtype=torch.float64).index_add_(0, micro.sequence, micro.weight.double() * value[micro.offset])
    whole = sum(float(value[:n].sum()) / (sum(lengths) if reduction == "token-mean" else len(lengths) * n) for n in lengths)
    error = math.sqrt(sum(float(terms[kind::4].var()) * copies for kind in range(4)))
    assert abs(float(terms.sum()) - whole) < 5 * error
    assert error < 0.2 * abs(whole), "the estimate is precise enough to tell"


def test_one_number_is_mixed_as_many_are() -> None:
    for seed, step in ((0, 0), (1, 7), (2**63 - 1, 2**31 - 1)):
        for group, sample in ((0, 0), (511, 15), (2**30, 3)):
            parts = [torch.tensor([part]) for part in (group, sample, 1 << 40)]
            assert draws.of_response(group, sample, seed, step) == float(draws._uniform(seed, step, *parts))


def test_a_cut_response_is_shorter_and_remembers_its_length() -> None:
    spec = recipe(select="prefix", top_entropy_quantile=0.3)
    long = make_responses([(4, 400)] * 50)
    short = [prefix.cut(r, spec, step=1) for r in long]
    assert sum(len(r.tokens) for r in short) == pytest.approx(0.3 * 50 * 400, rel=0.3)
    for before, after in zip(long, short, strict=True):
        n = len(after.tokens)
        assert n == prefix.kept(400, before.group, before.sample, spec, step=1) == 400 - after.cut
        assert after.whole_length == 400 and n >= 1
        assert torch.equal(after.tokens, before.tokens[:n]) and torch.equal(after.log_probs, before.log_probs[:n])
    assert pack(short).tokens.numel() < 0.5 * pack(long).tokens.numel(), "the forward is shorter"
    assert [prefix.cut(r, spec, step=2).cut for r in long] != [r.cut for r in short], "another step cuts elsewhere"
    assert prefix.cut(long[0], recipe(select="all"), step=1) is long[0]
    assert all(prefix.cut(r, recipe(select="prefix", top_entropy_quantile=1.0), step=1) is r for r in long)


# ---- edges


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=40), st.randoms())
def test_the_mean_does_not_depend_on_the_order(values: list[float], shuffle: Any) -> None:
    none = torch.empty(0)
    tokens = Candidates(none, none, none, none)
    mean = tokens.mean(torch.tensor(values))
    assert mean == pytest.approx(math.fsum(values) / len(values), abs=1e-7)
    shuffle.shuffle(values)
    assert tokens.mean(torch.tensor(values)) == mean
    assert math.isnan(tokens.mean(none))


def test_a_certain_token_has_no_surprisal() -> None:
    certain = Candidates(torch.zeros(3), torch.tensor([0.0, 1e-7, -3.0]), torch.ones(3), torch.zeros(3))
    assert rsi(certain, forks(select="rsi", rsi_interval=(0.0, 1.0))).tolist() == [True, True, False]
    assert not rsi(certain, forks(select="rsi", rsi_interval=(0.5, 1.0))).any()


def test_no_rare_token_silences_none() -> None:
    micro = pack(RESPONSES)
    micro.entropy, micro.old_log_prob = torch.rand(len(micro.positions)), torch.zeros(len(micro.positions))
    assert select_forks([micro], forks(select="stapo"), ForkGroups(), seed=0, step=0).selected == len(micro.positions)
    empty = pack([])
    empty.entropy = empty.old_log_prob = torch.empty(0)
    for case in CASES:
        found = select_forks([empty], case, ForkGroups(), seed=0, step=0)
        assert (found.selected, found.total) == (0, 0), case


def test_the_schema_knows_every_rule() -> None:
    from megafork.recipe import objective

    assert tuple(RULES) == objective.RULES


OWN = """
import torch
def late(tokens, forks):
    return 1.0 - tokens.entropy
def flags(tokens, forks):
    return tokens.advantage > 0
def wide(tokens, forks):
    return tokens.entropy.double()
def short(tokens, forks):
    return tokens.entropy[:1]
def nan(tokens, forks):
    return tokens.entropy / 0 * 0
def raises(tokens, forks):
    return tokens.entropies
"""


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    micro = pack(RESPONSES)
    micro.entropy = torch.rand(len(micro.positions), generator=torch.Generator().manual_seed(1))
    fifth = micro.entropy.sort().values[math.ceil(0.2 * len(micro.positions)) - 1]
    for function, wanted in (("late", micro.entropy <= fifth), ("flags", micro.advantage > 0)):
        case = forks(select=f"{file}:{function}")
        check_rule(case)
        select_forks([micro], case, ForkGroups(), seed=0, step=0)
        assert torch.equal(micro.mask, wanted)
    for wrong, message in (
        ("wide", "must return one tensor with a float32 score, or a boolean, for each token"),
        ("short", "must return one tensor with a float32 score, or a boolean, for each token"),
        ("nan", "returned NaN for a token"),
        ("raises", "raised AttributeError: .*entropies.*; fix it"),
        ("none", "defines no function 'none'"),
    ):
        with pytest.raises(RecipeError, match=rf"^forks.select is .*{message}"):
            check_rule(forks(select=f"{file}:{wrong}"))
    with pytest.raises(RecipeError, match="no such file"):
        check_rule(forks(select=f"{tmp_path}/none.py:f"))
