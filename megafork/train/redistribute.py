"""Sends responses from the ranks that sampled them to those that train on them, by one all-to-all; no rank holds more than its share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.mesh import Mesh
from megafork.rl.batch import Response
from megafork.train.sampler import Outcome

_HEADER = 4  # prompt, advantage, reward, accuracy


def redistribute(
    held: Sequence[Response],
    outcomes: Sequence[Outcome],
    dp_rank_of: Mapping[tuple[int, int], int],
    mesh: Mesh,
    *,
    entropies: bool = False,
    routing: RoutingSize | None = None,
) -> list[Response]:
    """Send each response to every rank of the DP rank that trains on it; returns this rank's, in the order of `outcomes`.

    `outcomes` and `dp_rank_of` ((group, sample) -> DP rank) must be the same on every rank. Every rank must call. Sizes follow from the
    outcomes, so only the responses are exchanged: 32 bits each for a token, its log-prob, its weights' version and, if `entropies`, which
    the responses then must have, its entropy; and its experts, if `routing` is given, in 8 bits each if that is enough.
    """
    per_token = 4 if entropies else 3

    def size(outcome: Outcome) -> int:
        words = routing.words(outcome.prompt_tokens + outcome.tokens - 1) if routing else 0
        return _HEADER + outcome.prompt_tokens + per_token * outcome.tokens + words

    mine = {(response.group, response.sample): response for response in held}
    sends = [
        [o for o in outcomes if o.owner == mesh.rank and dp_rank_of[o.group, o.sample] == mesh.dp_rank_of(rank)]
        for rank in range(mesh.world)
    ]
    receives = [[o for o in outcomes if o.owner == rank and dp_rank_of[o.group, o.sample] == mesh.dp_rank] for rank in range(mesh.world)]
    outgoing = [_encode(mine[o.group, o.sample], routing) for part in sends for o in part]
    incoming = torch.empty(sum(size(o) for part in receives for o in part), dtype=torch.int32)
    dist.all_to_all_single(
        incoming,
        torch.cat(outgoing) if outgoing else torch.empty(0, dtype=torch.int32),
        [sum(map(size, part)) for part in receives],
        [sum(map(size, part)) for part in sends],
    )
    got: dict[tuple[int, int], Response] = {}
    start = 0
    for outcome in (o for part in receives for o in part):
        got[outcome.group, outcome.sample] = _decode(incoming[start : start + size(outcome)], outcome, routing)
        start += size(outcome)
    return [got[o.group, o.sample] for o in outcomes if (o.group, o.sample) in got]


class RoutingSize(NamedTuple):
    """The size of a token's routing."""

    layers: int
    chosen: int
    """Experts of a token in each layer."""
    experts: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.experts <= 256 else torch.int16

    def words(self, tokens: int) -> int:
        """32-bit words for so many tokens."""
        return -(-tokens * self.layers * self.chosen * self.dtype.itemsize // 4)

    def encode(self, routing: Tensor) -> Tensor:
        """int16 [T, layers, k] -> int32 [words]."""
        data = routing.to(self.dtype).flatten().view(torch.uint8)
        return torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)

    def decode(self, data: Tensor, tokens: int) -> Tensor:
        """The reverse."""
        shape = (tokens, self.layers, self.chosen)
        return data.view(self.dtype)[: math.prod(shape)].to(torch.int16).view(shape)


def _encode(response: Response, routing: RoutingSize | None) -> Tensor:
    numbers = torch.tensor([response.advantage, response.reward, response.accuracy], dtype=torch.float32).view(torch.int32)
    prompt = torch.tensor([response.prompt], dtype=torch.int32)
    floats = [response.log_probs.view(torch.int32), response.entropies.view(torch.int32)]  # the latter may be empty
    experts = [routing.encode(response.routing)] if routing else []
    return torch.cat([prompt, numbers, response.prompt_tokens, response.tokens, response.versions, *floats, *experts])


def _decode(data: Tensor, outcome: Outcome, routing: RoutingSize | None) -> Response:
    experts = torch.empty(0, dtype=torch.int16)
    if routing:
        fed = outcome.prompt_tokens + outcome.tokens - 1
        data, encoded = data.split([len(data) - routing.words(fed), routing.words(fed)])
        experts = routing.decode(encoded.clone(), fed)
    numbers = data[1:_HEADER].view(torch.float32).tolist()
    sizes = [outcome.prompt_tokens, outcome.tokens, outcome.tokens, outcome.tokens]
    prompt, tokens, versions, log_probs, entropies = data[_HEADER:].clone().split([*sizes, len(data) - _HEADER - sum(sizes)])
    return Response(
        group=outcome.group,
        sample=outcome.sample,
        prompt=int(data[0]),
        prompt_tokens=prompt,
        tokens=tokens,
        log_probs=log_probs.view(torch.float32),
        versions=versions,
        entropies=entropies.view(torch.float32),
        truncated=outcome.truncated,
        advantage=numbers[0],
        reward=numbers[1],
        accuracy=numbers[2],
        routing=experts,
    )
