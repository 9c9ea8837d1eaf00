"""Responses sent from the ranks that sample them to those that train on them: under every layout, each rank gets its own and no others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from measure import Sent
from ranks import on_ranks
from responses import make_responses, name, random_lengths

from megafork.parallel.mesh import build_mesh
from megafork.recipe import Parallel
from megafork.rl.batch import Response
from megafork.train.redistribute import redistribute
from megafork.train.sampler import Outcome

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "TP2 DP2": (4, {"tp": 2}),
    "CP2 DP2": (4, {"cp": 2}),
    "PP2 DP2": (4, {"pp": 2}),
    "DP4": (4, {}),
}


def sampled(*, entropies: bool = False) -> list[Response]:
    """Responses with every field set, among their floats a NaN, an infinity, -0.0 and one that no short decimal names."""
    made = make_responses([*random_lengths(14, seed=9), (1, 1), (40, 1), (1, 40)])
    for n, response in enumerate(made):
        response.prompt, response.truncated = 1000 + n, n % 3 == 0
        response.accuracy, response.reward = float(n % 2), n / 8 - 1
        response.entropies = response.log_probs.neg() / 3 if entropies else response.entropies
        response.log_probs[-1] = [math.nan, -math.inf, -0.0, -1 / 3][n % 4]
    return made


def exchanged(
    layout: Parallel, owner: list[int], destination: list[int], entropies: bool
) -> tuple[int, list[Response], list[tuple[str, int]]]:
    """This rank's DP rank, the responses that it got, and the collectives that it took."""
    mesh = build_mesh(layout, seed=1, device=torch.device("cpu"))
    every = sampled(entropies=entropies)
    outcomes = [
        Outcome(r.group, r.sample, rank, len(r.prompt_tokens), len(r.tokens), r.accuracy, r.reward, r.truncated)
        for r, rank in zip(every, owner, strict=True)
    ]
    held = [r for r, rank in zip(every, owner, strict=True) if rank == mesh.rank]
    with Sent() as sent:
        got = redistribute(
            held[::-1], outcomes, {name(r): rank for r, rank in zip(every, destination, strict=True)}, mesh, entropies=entropies
        )
    return mesh.dp_rank, got, sent.calls


def same(a: Response, b: Response) -> bool:
    """Every field but `text`, floats by their bits."""
    floats = all(torch.equal(getattr(a, part).view(torch.int32), getattr(b, part).view(torch.int32)) for part in ("log_probs", "entropies"))
    floats &= torch.equal(*(torch.tensor([r.advantage, r.reward, r.accuracy]).view(torch.int32) for r in (a, b)))
    tokens = all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("tokens", "prompt_tokens", "versions"))
    dtypes = (a.tokens.dtype, a.prompt_tokens.dtype, a.log_probs.dtype) == (torch.int32, torch.int32, torch.float32)
    return floats and tokens and dtypes and (name(a), a.prompt, a.truncated) == (name(b), b.prompt, b.truncated)


def check(layout: str, owner: list[int], destination: list[int]) -> None:
    world, parallel = LAYOUTS[layout]
    entropies = layout == "CP2 DP2"
    every = sampled(entropies=entropies)
    for dp_rank, got, calls in on_ranks(world, exchanged, Parallel.model_validate(parallel), owner, destination, entropies):
        wanted = [response for response, rank in zip(every, destination, strict=True) if rank == dp_rank]
        assert [name(response) for response in got] == [name(response) for response in wanted]
        assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
        ((_, received),) = calls
        content = sum(4 * (len(r.prompt_tokens) + (3 + entropies) * len(r.tokens)) for r in wanted)
        assert content <= received <= content + 16 * len(wanted), "a rank receives its own responses and 16 bytes each for the rest"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_response_arrives_once_at_every_rank_that_trains_on_it(layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    dp = world // Parallel.model_validate(parallel).model_size
    generator = torch.Generator().manual_seed(world)
    count = len(sampled())
    check(layout, *(torch.randint(0, n, (count,), generator=generator).tolist() for n in (world, dp)))


@pytest.mark.parametrize("layout", ["TP2 DP2", "DP4"])
@pytest.mark.parametrize(("sender", "receiver"), [(0, 0), (3, 0), (0, 1)])
def test_ranks_that_send_nothing_or_receive_nothing(layout: str, sender: int, receiver: int) -> None:
    count = len(sampled())
    check(layout, [sender] * count, [receiver] * count)


def nothing() -> int:
    mesh = build_mesh(Parallel(), seed=1, device=torch.device("cpu"))
    return len(redistribute([], [], {}, mesh))


def test_a_step_without_any_response() -> None:
    assert on_ranks(2, nothing) == [0, 0]
