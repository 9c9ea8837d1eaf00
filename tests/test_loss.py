"""The objective against formulas written out in float64, for every reduction and every split over ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from responses import LAYOUTS, Layout, Name, Token, by_token, joined, make_responses, micro_batches, name, on_layout, random_lengths, spread
from torch import Tensor

from megafork.recipe import Forks, Loss, RecipeError
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import set_weights
from megafork.rl.objectives import OBJECTIVES, Tokens, check_objective, clip
from megafork.rl.packing import pack

RESPONSES = make_responses([*random_lengths(13, seed=4), (1, 1), (2, 9)])
REDUCTIONS = ("token-mean", "official", "seq-mean")
ADVANTAGES = st.floats(-5, 5, width=32).filter(lambda a: a == 0 or abs(a) > 1e-20)
"""Of smaller ones the products with a ratio and with its clipped value round to the same number."""
SETTINGS = [(reduction, counts) for reduction, counts in product(REDUCTIONS, ("selected", "response"))]


def token_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    return clip(Tokens(log_prob, old, advantage, torch.zeros(len(old), dtype=torch.int64), 1), loss)


def loss_of(**keys: Any) -> Loss:
    return Loss.model_validate(keys)


# ---- one token


def objective(log_ratio: float, advantage: float, loss: Loss) -> tuple[float, float]:
    """PAPER eq. 6 of one token, negated, and its derivative by the log-prob."""
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    gain = min(ratio * advantage, clipped * advantage)
    slope = ratio * advantage if gain == ratio * advantage else 0.0
    if loss.dual_clip is not None and advantage < 0 and gain < loss.dual_clip * advantage:
        gain, slope = loss.dual_clip * advantage, 0.0
    return -gain, -slope


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-6, 6, width=32), ADVANTAGES), min_size=1, max_size=20),
    st.floats(0, 0.9),
    st.floats(0, 2),
    st.none() | st.floats(1.1, 20),
)
@example([(0.0, 1.0), (0.0, -1.0)], 0.0, 0.0, None)  # on-policy: the gradient must be whole at ratio 1
@example([(0.26, 1.0), (0.24, 1.0), (-0.3, 1.0), (-0.3, -1.0), (0.3, -1.0)], 0.2, 0.28, None)
@example([(3.0, -1.0), (3.0, 1.0), (-3.0, -1.0)], 0.2, 0.28, 10.0)
def test_token_loss_and_gradient_equal_the_formula(tokens: list[tuple[float, float]], low: float, high: float, dual: float | None) -> None:
    loss = loss_of(clip_low=low, clip_high=high, dual_clip=dual)
    old = torch.linspace(-3, 0, len(tokens))
    log_prob = (old + torch.tensor([log_ratio for log_ratio, _ in tokens])).requires_grad_()
    advantage = torch.tensor([a for _, a in tokens])
    log_ratios = (log_prob.detach() - old).double().tolist()  # as fp32 holds them
    on_policy = all(log_ratio == 0 for log_ratio in log_ratios)
    for log_ratio in log_ratios:  # at an edge of a clip the gradient is that of either side
        for edge in (1 - low, 1 + high, dual or 1e9):
            assume(on_policy or abs(math.exp(log_ratio) - edge) > 1e-5)

    value, was_clipped = token_loss(log_prob, old, advantage, loss)
    value.sum().backward()

    wanted = [objective(log_ratio, a, loss) for log_ratio, a in zip(log_ratios, advantage.tolist(), strict=True)]
    assert value.tolist() == pytest.approx([loss for loss, _ in wanted], rel=1e-5, abs=1e-30)
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([slope for _, slope in wanted], rel=1e-5, abs=1e-30)
    for flag, log_ratio, a in zip(was_clipped.tolist(), log_ratios, advantage.tolist(), strict=True):
        assert flag == (math.exp(log_ratio) > 1 + high if a > 0 else a < 0 and math.exp(log_ratio) < 1 - low)


@pytest.mark.parametrize("dual_clip", [None, 10.0])
@pytest.mark.parametrize("log_ratio", [-1e30, -1e4, -100.0, 100.0, 1e4, 1e30])
def test_extreme_ratios_stay_finite(log_ratio: float, dual_clip: float | None) -> None:
    log_prob = torch.tensor([log_ratio, log_ratio, log_ratio], requires_grad=True)
    value, _ = token_loss(log_prob, torch.zeros(3), torch.tensor([3.0, -3.0, 0.0]), loss_of(dual_clip=dual_clip))
    value.sum().backward()
    assert log_prob.grad is not None
    assert value.isfinite().all()
    assert log_prob.grad.isfinite().all()
    if dual_clip is not None:
        assert value.max() <= 30.0


# ---- other objectives


def in_float64(name: str, log_prob: Tensor, old: Tensor, advantage: Tensor, response: Tensor, loss: Loss) -> Tensor:
    """The loss of each token, from the formulas of the papers; GSPO's with the gradient of its sequence objective."""
    low, high, ratio = 1 - loss.clip_low, 1 + loss.clip_high, (log_prob - old).exp()
    match name:
        case "gspo":
            means = [(log_prob - old)[response == n].mean() for n in response.tolist()]
            sequence = torch.stack(means).exp()
            return -torch.minimum(sequence * advantage, sequence.clamp(low, high) * advantage)
        case "cispo":
            return -ratio.detach().clamp(low, high) * advantage * log_prob
        case "sapo":
            steep = torch.tensor([loss.sapo_temperatures[0] if a > 0 else loss.sapo_temperatures[1] for a in advantage.tolist()])
            return -advantage * 4 / steep / (1 + (-steep * (ratio - 1)).exp())
        case "reinforce":
            return -advantage * log_prob
    raise AssertionError(name)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(["gspo", "cispo", "sapo", "reinforce"]))
def test_every_objective_and_its_gradient_equal_the_formula(data: st.DataObject, name: str) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    response = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage = torch.tensor(data.draw(st.lists(ADVANTAGES, min_size=len(lengths), max_size=len(lengths))))[response]
    shifts = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=len(response), max_size=len(response)))
    loss = loss_of(objective=name, clip_low=0.2, clip_high=0.28, sapo_temperatures=(1.0, 1.3))
    old = torch.linspace(-3, 0, len(response))
    log_prob = (old + torch.tensor(shifts)).requires_grad_()
    exact = log_prob.detach().double().requires_grad_()
    wanted = in_float64(name, exact, old.double(), advantage.double(), response, loss)
    if name == "gspo":  # at an edge of the clip the gradient is that of either side
        means = [(exact.detach() - old)[response == n].mean().exp() for n in range(len(lengths))]
        assume(all(abs(mean - edge) > 1e-4 for mean in means for edge in (0.8, 1.28)))
    value, _ = OBJECTIVES[name](Tokens(log_prob, old, advantage, response, len(lengths)), loss)
    value.sum().backward()
    wanted.sum().backward()
    assert value.dtype == torch.float32 and log_prob.grad is not None and exact.grad is not None
    assert value.tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-5)
    assert log_prob.grad.tolist() == pytest.approx(exact.grad.tolist(), rel=1e-4, abs=1e-5)


OWN = """
import torch
def half(tokens, loss):
    return -0.5 * tokens.advantage * tokens.ratio, torch.zeros_like(tokens.advantage, dtype=torch.bool)
def flags(tokens, loss):
    return tokens.log_prob, tokens.log_prob
def constant(tokens, loss):
    return tokens.advantage, tokens.advantage > 0
def one(tokens, loss):
    return tokens.log_prob.sum(), tokens.advantage > 0
def raises(tokens, loss):
    return tokens.logprob
"""


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    check_objective(loss_of(objective=f"{file}:half"))
    for wrong, message in (
        (f"{file}:flags", "must return finite losses that depend on tokens.log_prob, and booleans"),
        (f"{file}:constant", "must return finite losses that depend on tokens.log_prob, and booleans"),
        (f"{file}:one", "must return two tensors of as many elements"),
        (f"{file}:raises", "raised AttributeError: .*logprob.*; fix it"),
        (f"{file}:none", "defines no function 'none'"),
        (f"{tmp_path}/none.py:half", "no such file"),
        ("gpso", "did you mean 'gspo'"),
        ("trust", "known are clip, gspo"),
    ):
        with pytest.raises(RecipeError, match=rf"^loss.objective is .*{message}"):
            check_objective(loss_of(objective=wrong))
    file.write_text("import nothing_like_it\n")
    with pytest.raises(RecipeError, match="cannot be imported"):
        check_objective(loss_of(objective=f"{file}:half"))


# ---- the weights of a mini-batch


def masks_of(responses: list[Response], share: float, *, seed: int = 8) -> dict[Name, Tensor]:
    """Random masks; every third response has no selected token."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(len(response.tokens), generator=generator) < share for response in responses]
    return {name(r): draw & (n % 3 > 0) for n, (r, draw) in enumerate(zip(responses, draws, strict=True))}


def weigh(micros: list[MicroBatch], groups: ForkGroups, masks: dict[Name, Tensor]) -> list[dict[Token, float]]:
    """This rank's weights by token under each of SETTINGS."""
    for micro in micros:
        micro.mask = spread(micro, masks).bool()
    found = []
    for reduction, counts in SETTINGS:
        set_weights(micros, Forks.model_validate({"normalize_by": counts}), loss_of(reduction=reduction), groups)
        assert all(micro.weight.dtype == torch.float32 for micro in micros)
        found.append(by_token(micros, [micro.weight for micro in micros]))
    return found


def by_formula(layout: Layout, masks: dict[Name, Tensor], reduction: str, counts: str) -> dict[Token, float]:
    """A selected token's weight: 1 / tokens; n_micro / n / tokens of the micro-batch; 1 / n / tokens of the response."""
    n = len(RESPONSES)

    def denominators() -> Iterator[tuple[Response, float]]:
        for members in chain(*micro_batches(layout, RESPONSES)):
            for response in members:
                match reduction:
                    case "token-mean":
                        yield response, tokens(RESPONSES)
                    case "official":
                        yield response, n / len(members) * tokens(members)
                    case "seq-mean":
                        yield response, n * tokens([response])

    def tokens(responses: list[Response]) -> int:
        return sum(int(masks[name(r)].sum()) if counts == "selected" else len(r.tokens) for r in responses)

    return {
        (*name(response), offset): 1 / denominator if selected else 0.0
        for response, denominator in denominators()
        for offset, selected in enumerate(masks[name(response)].tolist())
    }


@pytest.mark.parametrize("share", [0.3, 0.0], ids=["", "no token selected"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_equal_the_formula_for_every_layout(layout: str, share: float) -> None:
    masks = masks_of(RESPONSES, share)
    ranks = on_layout(LAYOUTS[layout], weigh, RESPONSES, masks)
    for n, (reduction, counts) in enumerate(SETTINGS):
        found = joined([rank[n] for rank in ranks])
        wanted = by_formula(LAYOUTS[layout], masks, reduction, counts)
        assert found.keys() == wanted.keys()
        for token, weight in found.items():
            assert weight == pytest.approx(wanted[token], rel=1e-6, abs=0), (reduction, counts, token)


def test_weights_of_token_and_sequence_means_are_the_same_bits_for_every_layout() -> None:
    masks = masks_of(RESPONSES, 0.3)
    alone, ranks = (on_layout(LAYOUTS[layout], weigh, RESPONSES, masks) for layout in ("one micro-batch", "CP2 DP2 padded"))
    for n, (reduction, counts) in enumerate(SETTINGS):
        if reduction != "official":  # whose means are a micro-batch's
            assert joined([rank[n] for rank in ranks]) == alone[0][n], (reduction, counts)


@pytest.mark.parametrize(("reduction", "counts"), SETTINGS)
def test_rho_one_weighs_as_plain_dapo_to_the_last_bit(reduction: str, counts: str) -> None:
    micros = [pack(members) for members in micro_batches(Layout(budget=30), RESPONSES)[0]]
    for micro in micros:
        micro.entropy = torch.rand(len(micro.positions))
    weights = []
    for choice in ({"top_entropy_quantile": 1.0}, {"select": "all"}):
        forks = Forks.model_validate({"normalize_by": counts, **choice})
        select_forks(micros, forks, ForkGroups(), seed=0, step=0)
        set_weights(micros, forks, loss_of(reduction=reduction), ForkGroups())
        weights.append(torch.cat([micro.weight for micro in micros]))
    assert torch.equal(*weights)
    assert weights[0].double().sum() == pytest.approx(1.0, rel=1e-5)


# ---- a whole mini-batch


def minibatch_loss(
    micros: list[MicroBatch], groups: ForkGroups, masks: dict[Name, Tensor], drift: dict[Name, Tensor], loss: Loss
) -> tuple[float, dict[Token, float]]:
    """This rank's share of the loss, and the gradient of each of its tokens."""
    total = torch.zeros((), dtype=torch.float64)
    shifts = []
    for micro in micros:
        micro.mask = spread(micro, masks).bool()
        shifts.append(spread(micro, drift).requires_grad_())
    set_weights(micros, Forks(), loss, groups)
    for micro, shift in zip(micros, shifts, strict=True):
        old = micro.rollout_log_prob[micro.mask]
        value, _ = token_loss(old + shift[micro.mask], old, micro.advantage[micro.mask], loss)
        total = total + (micro.weight[micro.mask] * value).double().sum()
    total.backward()
    return total.item(), by_token(micros, [shift.grad if shift.grad is not None else torch.zeros_like(shift) for shift in shifts])


def drift_of(responses: list[Response]) -> dict[Name, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name(r): 0.4 * torch.randn(len(r.tokens), generator=generator) for r in responses}


@pytest.mark.parametrize("layout", ["many micro-batches", "DP3", "CP2 DP2 padded"])
def test_grpo_is_a_mean_of_responses_means_with_a_symmetric_clip(layout: str) -> None:
    """GRPO (arXiv 2402.03300) eq. 3 without the KL term: all tokens, eps 0.2 both ways, 1/G sum_i 1/|o_i| sum_t."""
    drift, everything = drift_of(RESPONSES), {name(r): torch.ones(len(r.tokens), dtype=torch.bool) for r in RESPONSES}
    spec = loss_of(reduction="seq-mean", clip_low=0.2, clip_high=0.2)
    ranks = on_layout(LAYOUTS[layout], minibatch_loss, RESPONSES, everything, drift, spec)

    wanted, slopes = 0.0, {}
    for r in RESPONSES:
        for n, d in enumerate(drift[name(r)].double().tolist()):
            ratio = math.exp(d)
            free, clipped = ratio * r.advantage, min(max(ratio, 0.8), 1.2) * r.advantage
            wanted -= min(free, clipped) / len(r.tokens) / len(RESPONSES)
            slopes[*name(r), n] = -free / len(r.tokens) / len(RESPONSES) if free <= clipped else 0.0
    assert math.fsum(total for total, _ in ranks) == pytest.approx(wanted, rel=1e-5)
    found = joined([gradients for _, gradients in ranks])
    assert found == pytest.approx(slopes, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_minibatch_without_a_fork_has_loss_and_gradient_zero(reduction: str) -> None:
    nothing = {name(r): torch.zeros(len(r.tokens), dtype=torch.bool) for r in RESPONSES}
    ((total, gradients),) = on_layout(Layout(), minibatch_loss, RESPONSES, nothing, drift_of(RESPONSES), loss_of(reduction=reduction))
    assert total == 0.0
    assert set(gradients.values()) == {0.0}
