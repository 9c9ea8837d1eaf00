"""Masks against a sort in float64: bit-equal for every split of the same responses over ranks, micro-batches and context-parallel ranks."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from responses import LAYOUTS, Layout, Name, Token, by_token, joined, make_responses, micro_batches, name, on_layout, random_lengths, spread
from tiny import recipe, save_model
from torch import Tensor

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Forks, Recipe
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, Selection, select_forks
from megafork.rl.packing import pack
from megafork.shape import read_shape
from megafork.train.learner import Learner
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy

SEED, STEP = 3, 2
MANY = make_responses([*random_lengths(17), (1, 1), (5, 1)])
FEW = make_responses([(3, 7), (2, 1)])


def forks(**keys: Any) -> Forks:
    return Forks.model_validate(keys)


SETTINGS = [
    *(forks(select=s, scope=c) for s, c in product(("top", "bottom", "random"), ("batch", "minibatch", "microbatch", "sequence"))),
    *(forks(select=s, scope="fixed", threshold=1.25) for s in ("top", "bottom")),
    forks(select="all"),
    forks(top_entropy_quantile=0.07),
    forks(top_entropy_quantile=0.5, scope="sequence"),
]


def entropies_of(responses: list[Response], *, seed: int = 1) -> dict[Name, Tensor]:
    """fp32 entropies; half of them on a coarse grid, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for response in responses:
        values = torch.rand(len(response.tokens), generator=generator) * 2.5
        made[name(response)] = torch.where(torch.rand(len(values), generator=generator) < 0.5, (values * 4).round() / 4, values)
    return made


def select(
    micros: list[MicroBatch], groups: ForkGroups, entropies: dict[Name, Tensor], cases: list[Forks]
) -> list[tuple[Selection, dict[Token, bool]]]:
    """Each setting's threshold, and the masks of this rank by token."""
    for micro in micros:
        micro.entropy = spread(micro, entropies)
    found = []
    for case in cases:
        threshold = select_forks(micros, case, groups, seed=SEED, step=STEP)
        assert all(micro.mask.dtype == torch.bool for micro in micros)
        found.append((threshold, by_token(micros, [micro.mask for micro in micros])))
    return found


def select_on(
    layout: Layout, responses: list[Response], entropies: dict[Name, Tensor], cases: list[Forks]
) -> list[tuple[Selection, dict[Token, bool]]]:
    """Each setting's threshold, which must be the same on every rank, and the masks of all ranks together."""
    ranks = on_layout(layout, select, responses, entropies, cases)
    answers = []
    for n in range(len(cases)):
        assert len({repr(rank[n][0]) for rank in ranks}) == 1
        answers.append((ranks[0][n][0], joined([rank[n][1] for rank in ranks])))
    return answers


def sharing_a_threshold(layout: Layout, responses: list[Response], scope: str) -> list[list[Response]]:
    if scope == "microbatch":
        return [members for members in chain(*micro_batches(layout, responses)) if members]
    return [[response] for response in responses] if scope == "sequence" else [responses]


def by_sorting(layout: Layout, responses: list[Response], entropies: dict[Name, Tensor], case: Forks) -> tuple[float, dict[Token, bool]]:
    """Mean tau and masks of `top` and `bottom`, by a sort in float64."""
    sign = 1.0 if case.select == "top" else -1.0
    taus, masks = [], {}
    for part in sharing_a_threshold(layout, responses, case.scope):
        keys = {(*name(r), n): sign * key for r in part for n, key in enumerate(entropies[name(r)].double().tolist())}
        k = math.ceil(Decimal(repr(case.top_entropy_quantile)) * len(keys))
        tau = sorted(keys.values(), reverse=True)[k - 1] if case.threshold is None else sign * case.threshold
        masks.update({token: key >= tau for token, key in keys.items()})
        taus.append(sign * tau)
    return math.fsum(taus) / len(taus), masks


@pytest.mark.parametrize("responses", [MANY, FEW], ids=["many responses", "fewer responses than ranks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_equal_a_sort_for_every_layout(layout: str, responses: list[Response]) -> None:
    entropies = entropies_of(responses)
    found = select_on(LAYOUTS[layout], responses, entropies, SETTINGS)
    total = sum(len(response.tokens) for response in responses)
    for case, (threshold, masks) in zip(SETTINGS, found, strict=True):
        assert len(masks) == total == threshold.total, case
        assert sum(masks.values()) == threshold.selected, case
        if case.select in ("top", "bottom"):
            tau, wanted = by_sorting(LAYOUTS[layout], responses, entropies, case)
            assert masks == wanted, case
            assert threshold.tau == pytest.approx(tau, rel=1e-12), case
            if case.scope in ("batch", "minibatch"):
                assert threshold.ties == sum(int((values == threshold.tau).sum()) for values in entropies.values())
        elif case.select == "all":
            assert all(masks.values())
        else:
            assert math.isnan(threshold.tau)
            for part in sharing_a_threshold(LAYOUTS[layout], responses, case.scope):
                share = [masks[(*name(r), n)] for r in part for n in range(len(r.tokens))]
                assert sum(share) == math.ceil(Decimal(repr(case.top_entropy_quantile)) * len(share)), case


@pytest.mark.parametrize("layout", ["many micro-batches", "DP3", "CP2"])
def test_random_masks_are_the_same_for_every_layout(layout: str) -> None:
    cases = [forks(select="random", scope=scope) for scope in ("batch", "sequence")]
    alone, spread_out = (select_on(LAYOUTS[n], MANY, entropies_of(MANY), cases) for n in ("one micro-batch", layout))
    assert [masks for _, masks in alone] == [masks for _, masks in spread_out]


@pytest.mark.parametrize("scope", ["microbatch", "sequence"])
def test_context_parallel_ranks_share_the_threshold_of_a_micro_batch_and_of_a_response(scope: str) -> None:
    cases = [forks(select=select, scope=scope) for select in ("top", "bottom", "random")]
    alone, split = (select_on(Layout(cp=cp, multiple=4), MANY, entropies_of(MANY), cases) for cp in (1, 2))
    for (threshold, masks), (threshold_split, masks_split) in zip(alone, split, strict=True):
        assert masks == masks_split
        assert threshold_split.tau == pytest.approx(threshold.tau, rel=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(0, 12, width=32) | st.sampled_from([0.0, 0.5, 0.5000000596]), min_size=1, max_size=9), min_size=1, max_size=9
    ),
    st.integers(1, 1000),
    st.sampled_from(["top", "bottom"]),
    st.sampled_from(["minibatch", "microbatch", "sequence"]),
    st.integers(1, 40),
)
@example([[0.0] * 5, [0.0]], 200, "top", "minibatch", 5)  # a deterministic policy: all entropies equal
@example([[0.0] * 5, [0.0]], 200, "bottom", "sequence", 5)
def test_masks_equal_a_sort_for_any_entropies(rows: list[list[float]], per_mille: int, select: str, scope: str, budget: int) -> None:
    responses = make_responses([(1 + n % 3, len(row)) for n, row in enumerate(rows)])
    entropies = {name(r): torch.tensor(row, dtype=torch.float32) for r, row in zip(responses, rows, strict=True)}
    case = forks(select=select, scope=scope, top_entropy_quantile=per_mille / 1000)
    ((threshold, masks),) = select_on(Layout(budget=budget), responses, entropies, [case])
    tau, wanted = by_sorting(Layout(budget=budget), responses, entropies, case)
    assert masks == wanted
    assert threshold.tau == pytest.approx(tau, rel=1e-12)


@pytest.mark.parametrize("scope", ["batch", "minibatch", "microbatch", "sequence"])
@pytest.mark.parametrize("select", ["top", "bottom", "random"])
def test_rho_one_selects_all(select: str, scope: str) -> None:
    ((threshold, masks),) = select_on(Layout(), MANY, entropies_of(MANY), [forks(select=select, scope=scope, top_entropy_quantile=1.0)])
    assert all(masks.values())
    assert threshold.selected == threshold.total == len(masks)


def test_equal_entropies_are_all_selected_and_counted_as_ties() -> None:
    entropies = {name(r): torch.full((len(r.tokens),), 0.7) for r in MANY}
    for threshold, masks in select_on(Layout(), MANY, entropies, [forks(), forks(select="bottom")]):
        assert all(masks.values())
        assert threshold.ties == threshold.selected == len(masks)
        assert threshold.tau == pytest.approx(0.7)


def test_no_rank_holds_anything() -> None:
    for case in SETTINGS:
        threshold = select_forks([pack([])], case, ForkGroups(), seed=SEED, step=STEP)
        assert (threshold.selected, threshold.total) == (0, 0), case


def random_mask(responses: list[Response], *, seed: int, step: int, rho: float = 0.2) -> Tensor:
    """[responses, tokens] of responses of one length, all in one micro-batch."""
    micro = pack(responses)
    micro.entropy = torch.zeros(len(micro.positions))
    select_forks([micro], forks(select="random", top_entropy_quantile=rho), ForkGroups(), seed=seed, step=step)
    return micro.mask.view(len(responses), -1)


def test_random_choice_is_uniform_and_independent_across_seeds_steps_groups_samples_and_tokens() -> None:
    count, length, rho = 64, 128, 0.3
    responses = make_responses([(1, length)] * count, samples=8)
    draws = torch.stack([torch.stack([random_mask(responses, seed=s, step=t, rho=rho) for t in range(6)]) for s in range(6)]).double()
    draws = draws.view(6, 6, 8, 8, length)  # seed, step, group, sample, offset
    for axis in range(5):
        others = [n for n in range(5) if n != axis]
        share = draws.mean(others)
        deviation = math.sqrt(rho * (1 - rho) * draws.size(axis) / draws.numel())
        assert (share - rho).abs().max() < 5 * deviation, "a seed, step, group, sample or offset is preferred"
        near, far = draws.narrow(axis, 0, draws.size(axis) - 1), draws.narrow(axis, 1, draws.size(axis) - 1)
        correlation = ((near - rho) * (far - rho)).mean() / (rho * (1 - rho))
        assert correlation.abs() < 5 / math.sqrt(near.numel()), "neighbours along an axis depend on each other"


def _masks_at_temperature(spec: Recipe, responses: list[Response], temperature: float) -> tuple[Tensor, Tensor, float]:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    shape, folder = read_shape(Path(spec.model.path)), Path(spec.model.path)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    micro = pack(responses, temperature=temperature)
    Learner(chunks, spec, mesh, updates=1).score([micro])
    threshold = select_forks([micro], spec.forks, ForkGroups(), seed=SEED, step=STEP)
    return micro.entropy, micro.mask, threshold.tau


def test_forks_are_those_of_the_entropy_at_the_rollout_temperature(tmp_path: Path) -> None:
    import transformers

    folder = save_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    temperature = 4.0
    scaled: list[Tensor] = []
    plain: list[Tensor] = []
    with torch.no_grad():
        for r in MANY:
            logits = model(torch.cat([r.prompt_tokens, r.tokens]).long()[None]).logits[0, len(r.prompt_tokens) - 1 : -1]
            for found, t in ((scaled, temperature), (plain, 1.0)):
                found.append(torch.distributions.Categorical(logits=logits / t).entropy())
    wanted, other = torch.cat(scaled), torch.cat(plain)
    k = math.ceil(Decimal("0.2") * len(wanted))
    tau, tau_plain = (values.sort(descending=True).values[k - 1] for values in (wanted, other))
    assert not torch.equal(wanted >= tau, other >= tau_plain), "the temperature must matter for this model"
    ((entropy, mask, found_tau),) = on_ranks(1, _masks_at_temperature, recipe(folder), MANY, temperature)
    torch.testing.assert_close(entropy.double(), wanted, atol=1e-5, rtol=0)
    assert torch.equal(mask, wanted >= tau)
    assert found_tau == pytest.approx(float(tau), abs=1e-5)
