"""Idle share of two roll-out engines when responses differ in length: prompts dealt by the lengths learnt, and by number.

Simulated with the run's own dealer, so that the figures repeat. A prompt's mean length is log-normal (sigma 1), and so are its responses
around it (sigma 0.3), at most 8,192 tokens; 1,024 prompts, two epochs, the second one counted. In the first rows an engine's time is its
tokens. In the others it decodes up to `running` responses at once, and a decoding step takes as long as a fixed part and a part per
response, which are equal at `half` responses. Then the limit is the longest response, which one engine has to draw to its end with few
others beside it: dealing with all lengths known in advance (the last number) leaves about as much idle.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.figure import Figure, Series
from megafork.data.prompts import Prompt
from megafork.train.dealing import Dealer

ENGINES, PROMPTS, LONGEST = 2, 1024, 8192
LEARNT, NUMBER, KNOWN = "by learnt lengths", "by number", "by lengths known in advance"
CASES = ((16, 8, 32, 32), (64, 8, 64, 32), (128, 16, 256, 64))
"""Prompts per step, samples, running, half."""

Time = Callable[[Sequence[int]], float]
"""Time of an engine for responses of these lengths, in the order in which they are begun."""


def run(quick: bool) -> list[Figure]:
    seeds = 1 if quick else 5
    tokens = [_figure(f"{case[0]} prompts x {case[1]}, tokens alone", *case[:2], sum, seeds) for case in CASES]
    times = [
        _figure(f"{prompts} prompts x {samples}, {running} running, half {half}", prompts, samples, partial(seconds, running, half), seeds)
        for prompts, samples, running, half in CASES
    ]
    return tokens + times


def _figure(case: str, prompts: int, samples: int, time: Time, seeds: int) -> Figure:
    shares: dict[str, list[float]] = {LEARNT: [], NUMBER: [], KNOWN: []}
    for seed in range(seeds):
        for way, found in _idle(prompts, samples, time, seed).items():
            shares[way].append(100 * found)
    return Figure(
        f"idle share of {ENGINES} engines, {case}",
        "%",
        Series(LEARNT, shares[LEARNT]),
        Series(NUMBER, shares[NUMBER]),
        at_least=3.0,
        note="simulated",
        extra={"known_in_advance_percent": statistics.median(shares[KNOWN])},
    )


def _idle(count: int, samples: int, time: Time, seed: int) -> dict[str, float]:
    draw = random.Random(seed)
    means = [draw.lognormvariate(6.0, 1.0) for _ in range(PROMPTS)]
    every = [Prompt(index, "", (), {}, "") for index in range(PROMPTS)]
    dealer = Dealer()
    busy, span = dict.fromkeys((LEARNT, NUMBER, KNOWN), 0.0), dict.fromkeys((LEARNT, NUMBER, KNOWN), 0.0)
    for epoch in range(2):
        order = draw.sample(every, PROMPTS)
        for first in range(0, PROMPTS, count):
            batch = order[first : first + count]
            lengths = [[min(LONGEST, 1 + int(means[p.index] * draw.lognormvariate(0.0, 0.3))) for _ in range(samples)] for p in batch]
            by_number = [list(range(engine, count, ENGINES)) for engine in range(ENGINES)]
            learnt = dealer.deal(batch, ENGINES)
            for prompt, drawn in zip(batch, lengths, strict=True):
                dealer.learn(prompt, drawn)
            for way, dealt in ((LEARNT, learnt), (NUMBER, by_number), (KNOWN, dealer.deal(batch, ENGINES))) if epoch else ():
                times = [time([n for place in part for n in lengths[place]]) for part in dealt]
                busy[way] += sum(times)
                span[way] += len(times) * max(times)
    return {way: 1 - busy[way] / span[way] for way in busy}


def seconds(running: int, half: int, lengths: Sequence[int]) -> float:
    """A `Time`, in the fixed parts of decoding steps."""
    waiting = iter(lengths)
    active = [length for _, length in zip(range(running), waiting, strict=False)]
    heapq.heapify(active)  # steps at which the active ones end
    time = step = 0.0
    while active:
        end = heapq.heappop(active)
        time += (end - step) * (1 + (len(active) + 1) / half)
        step = end
        following = next(waiting, None)
        if following is not None:
            heapq.heappush(active, int(step) + following)
    return time
