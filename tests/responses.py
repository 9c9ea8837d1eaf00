"""Random responses, placed on the ranks of a layout as a training step would place them (without a model)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups
from megafork.rl.packing import pack, plan

Name = tuple[int, int]
"""(group, sample)."""
Token = tuple[int, int, int]
"""(group, sample, offset in the response)."""


@dataclass(frozen=True)
class Layout:
    """How a mini-batch is spread: DP and CP ranks, the token budget of a micro-batch, the multiple that sequences are padded to."""

    dp: int = 1
    cp: int = 1
    budget: int = 60
    multiple: int = 1


LAYOUTS = {
    "one micro-batch": Layout(budget=10_000),
    "many micro-batches": Layout(budget=30),
    "padded": Layout(budget=48, multiple=8),
    "DP2": Layout(dp=2),
    "DP3": Layout(dp=3, budget=40),
    "CP2": Layout(cp=2, multiple=4),
    "CP2 DP2 padded": Layout(dp=2, cp=2, multiple=8),
}


def name(response: Response) -> Name:
    return response.group, response.sample


def make_responses(lengths: Sequence[tuple[int, int]], *, samples: int = 4, seed: int = 5) -> list[Response]:
    """Responses of these (prompt tokens, response tokens), `samples` to a group, with random tokens, log-probs and advantages."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n, (prompt, answer) in enumerate(lengths):
        prompt_tokens, tokens = (torch.randint(1, 99, (k,), generator=generator, dtype=torch.int32) for k in (prompt, answer))
        log_probs = -torch.rand(answer, generator=generator)
        advantage = float(torch.randn((), generator=generator))
        made.append(
            Response(
                n // samples, n % samples, n // samples, prompt_tokens, tokens, log_probs, False, advantage=advantage, versions=tokens % 5
            )
        )
    return made


def random_lengths(count: int, *, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, response) tokens, 1 to 12 and 1 to 16."""
    generator = torch.Generator().manual_seed(seed)
    return [(int(torch.randint(1, 13, (), generator=generator)), int(torch.randint(1, 17, (), generator=generator))) for _ in range(count)]


def micro_batches(layout: Layout, responses: list[Response]) -> list[list[list[Response]]]:
    """The responses of each micro-batch of each DP rank."""
    placed = plan([response.length for response in responses], layout.dp, layout.budget, layout.multiple)
    return [[[responses[n] for n in members] for members in micros] for micros in placed]


def on_layout(layout: Layout, function: Callable[..., Any], responses: list[Response], *args: Any) -> list[Any]:
    """`function(micros, groups, *args)` on every rank of the layout; the results in rank order (CP fastest)."""
    if layout.dp * layout.cp == 1:
        return [function([pack(members, multiple=layout.multiple) for members in micro_batches(layout, responses)[0]], ForkGroups(), *args)]
    return on_ranks(layout.dp * layout.cp, _on_rank, layout, function, responses, args)


def _on_rank(layout: Layout, function: Callable[..., Any], responses: list[Response], args: tuple[Any, ...]) -> Any:
    dp_rank, cp_rank = divmod(dist.get_rank(), layout.cp)
    contexts = [dist.new_group(range(n * layout.cp, (n + 1) * layout.cp)) for n in range(layout.dp)]
    micros = [
        pack(members, cp=layout.cp, cp_rank=cp_rank, multiple=layout.multiple) for members in micro_batches(layout, responses)[dp_rank]
    ]
    return function(micros, ForkGroups(dist.group.WORLD, contexts[dp_rank]), *args)


def spread(micro: MicroBatch, values: Mapping[Name, Tensor]) -> Tensor:
    """Values a response as values of the micro-batch's positions [P]."""
    flat = torch.cat([values[name(response)] for response in micro.responses] or [torch.empty(0)])
    starts = torch.tensor([0] + [len(response.tokens) for response in micro.responses]).cumsum(0)
    return flat[starts[micro.sequence] + micro.offset]


def by_token(micros: list[MicroBatch], values: Sequence[Tensor]) -> dict[Token, Any]:
    """Values [P] of each micro-batch by token; a token seen twice fails."""
    found: dict[Token, Any] = {}
    for micro, value in zip(micros, values, strict=True):
        for n, item in enumerate(value.tolist()):
            token = (*name(micro.responses[int(micro.sequence[n])]), int(micro.offset[n]))
            assert token not in found, f"{token} is held twice"
            found[token] = item
    return found


def joined(parts: Sequence[Mapping[Token, Any]]) -> dict[Token, Any]:
    """What the ranks hold together; a token on two ranks fails."""
    whole = {token: value for part in parts for token, value in part.items()}
    assert len(whole) == math.fsum(map(len, parts)), "a token is held by two ranks"
    return whole
