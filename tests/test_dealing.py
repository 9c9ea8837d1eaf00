"""Prompts are dealt to engines by the lengths of their earlier responses: identically on every rank, and balanced."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from megafork.data.prompts import Prompt
from megafork.train.dealing import Dealer


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index, f"prompt {index}", (index,), {}, "here") for index in range(count)]


@given(st.integers(0, 40), st.integers(1, 8), st.dictionaries(st.integers(0, 39), st.integers(1, 10**6)))
def test_every_prompt_is_dealt_once_and_a_checkpoint_keeps_what_was_learnt(count: int, engines: int, seen: dict[int, int]) -> None:
    dealer, other, every = Dealer(), Dealer(), prompts(count)
    for index, tokens in seen.items():
        dealer.learn(prompts(40)[index], [tokens])
    dealt = dealer.deal(every, engines)
    assert len(dealt) == engines and sorted(place for part in dealt for place in part) == list(range(count))
    if not seen:
        assert dealt == [list(range(engine, count, engines)) for engine in range(engines)], "in turn"
    other.restore(dealer.state())
    assert other.deal(every, engines) == dealt


def test_skewed_lengths_leave_a_third_of_the_idle_time_of_dealing_in_turn() -> None:
    """Two engines, log-normal lengths (sigma 1) of prompts, and of a prompt's responses around its own mean (sigma 0.3)."""
    draw, every = random.Random(1), prompts(256)
    means = [draw.lognormvariate(6.0, 1.0) for _ in every]

    def lengths(index: int) -> list[int]:
        return [1 + int(means[index] * draw.lognormvariate(0.0, 0.3)) for _ in range(8)]

    dealer = Dealer()
    for prompt in every:
        dealer.learn(prompt, lengths(prompt.index))
    idle = {"in turn": 0.0, "by length": 0.0}
    for _ in range(100):
        batch = draw.sample(every, 16)
        tokens = {prompt.index: sum(lengths(prompt.index)) for prompt in batch}
        for way, dealt in (("in turn", Dealer().deal(batch, 2)), ("by length", dealer.deal(batch, 2))):
            loads = [sum(tokens[batch[place].index] for place in part) for part in dealt]
            idle[way] += 1.0 - sum(loads) / (2 * max(loads))
    assert idle["by length"] < idle["in turn"] / 3, idle
