"""The plan's guarantees, and packed micro-batches against each response handled separately."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from responses import LAYOUTS, make_responses, name, on_layout, random_lengths
from torch import Tensor

from megafork.parallel.context import places_of, unzigzag_index, zigzag_index
from megafork.recipe import Parallel
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups
from megafork.rl.packing import pack, plan

CP = pytest.mark.parametrize(("cp", "multiple"), [(1, 1), (1, 8), (2, 4), (2, 16), (4, 8), (4, 32)])

# ---- the plan


def padded_to(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 9), st.integers(1, 400), st.sampled_from([1, 4, 8, 16]))
@example([], 2, 10, 1)  # nothing to train on
@example([5], 4, 10, 1)  # more ranks than sequences
@example([200, 3, 3, 150], 2, 64, 8)  # lengths over the budget
@example([3, 3, 2, 2, 2], 1, 6, 1)  # a balanced filling needs one micro-batch more than first fit
@example([6, 4, 3, 3, 3, 3, 2, 2], 2, 7, 1)  # the same on the last of two ranks: the first must follow
def test_plan_covers_every_sequence_once_within_the_budget(lengths: list[int], dp: int, budget: int, multiple: int) -> None:
    placed = plan(lengths, dp, budget, multiple)
    assert len(placed) == dp
    assert sorted(itertools.chain(*itertools.chain(*placed))) == list(range(len(lengths)))
    assert len({len(micros) for micros in placed}) == 1, "every rank must run the schedule equally often"
    for members in itertools.chain(*placed):
        assert len(members) == 1 or sum(padded_to(lengths[n], multiple) for n in members) <= budget
    assert all(any(members) for members in zip(*placed, strict=True)), "no micro-batch is empty on every rank"
    assert plan(lengths, dp, budget, multiple) == placed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 9), st.integers(200, 400), st.sampled_from([1, 8]))
def test_plan_is_balanced_and_not_wasteful(lengths: list[int], dp: int, budget: int, multiple: int) -> None:
    placed = plan(lengths, dp, budget, multiple)
    padded = [padded_to(length, multiple) for length in lengths]
    loads = [sum(padded[n] for n in itertools.chain(*micros)) for micros in placed]
    quadratic = max(padded) * (max(loads) + max(padded)) / 32768  # the plan weighs attention too: here a hundredth of the tokens
    assert max(loads) - min(loads) <= max(padded) + quadratic
    # any two micro-batches of a tight filling hold more than one budget together
    assert len(placed[0]) <= 2 * math.ceil(max(loads) / budget) + 1


def test_the_longest_sequence_is_placed_first_and_the_rest_follow_by_load() -> None:
    assert plan([4, 1, 8, 3], 2, 8) == [[[2]], [[0, 3, 1]]]


def test_micro_batches_of_a_rank_are_even() -> None:
    (micros,) = plan([10] * 12, 1, 50)
    assert sorted(map(len, micros)) == [4, 4, 4]
    (micros,) = plan([2, 2, 6, 2, 3, 1], 1, 9)
    assert sorted(sum([2, 2, 6, 2, 3, 1][n] for n in members) for members in micros) == [8, 8]


@pytest.mark.parametrize(
    ("layout", "multiple"),
    [({}, 1), ({"tp": 4}, 1), ({"tp": 4, "sp": True}, 4), ({"cp": 2}, 4), ({"cp": 4, "tp": 2}, 8), ({"cp": 2, "tp": 2, "sp": True}, 8)],
)
def test_sequence_multiple(layout: dict[str, object], multiple: int) -> None:
    assert Parallel.model_validate(layout).sequence_multiple == multiple


# ---- the zigzag split


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from([1, 2, 3, 4, 8]))
def test_zigzag_gives_each_rank_two_mirrored_chunks_and_unzigzag_undoes_it(chunks: list[int], cp: int) -> None:
    lengths = [2 * cp * chunk for chunk in chunks]
    packed = torch.arange(sum(lengths))
    by_hand: list[list[int]] = [[] for _ in range(cp)]
    for sequence, chunk in zip(packed.split(lengths), chunks, strict=True):
        pieces = sequence.split(chunk)
        for rank in range(cp):
            by_hand[rank] += [*pieces[rank].tolist(), *pieces[2 * cp - 1 - rank].tolist()]
    held = [zigzag_index(lengths, cp, rank) for rank in range(cp)]
    if cp > 1:
        assert [index.tolist() for index in held] == by_hand
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert [places_of(lengths, index).tolist() for index in held] == [positions[index].tolist() for index in held]
    gathered = torch.cat([packed[index] for index in held])
    assert torch.equal(gathered[unzigzag_index(lengths, cp)], packed)


@pytest.mark.parametrize("lengths", [[6], [8, 4, 2], [3]])
def test_zigzag_refuses_lengths_that_do_not_split(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=f"a sequence of {lengths[-1]} tokens is not a multiple of 2 x cp = 4"):
        zigzag_index(lengths, 2, 0)


# ---- packing

RESPONSES = [replace(r, advantage=float(n)) for n, r in enumerate(make_responses([*random_lengths(9, seed=2), (1, 1), (1, 5), (7, 1)]))]


def held_by(lengths: tuple[int, ...], cp: int, cp_rank: int) -> list[tuple[int, int]]:
    """(sequence, place in it) of each token of a CP rank: for cp > 1 chunks `cp_rank` and `2 cp - 1 - cp_rank` of each sequence."""
    places = []
    for n, length in enumerate(lengths):
        chunk = length // (2 * cp) if cp > 1 else length
        starts = (cp_rank * chunk, length - (cp_rank + 1) * chunk) if cp > 1 else (0,)
        places += [(n, place) for start in starts for place in range(start, start + chunk)]
    return places


@CP
def test_a_label_is_the_next_token_of_its_own_sequence(cp: int, multiple: int) -> None:
    found = set()
    for cp_rank in range(cp):
        micro = pack(RESPONSES, cp=cp, cp_rank=cp_rank, multiple=multiple)
        assert micro.lengths == tuple(padded_to(len(r.prompt_tokens) + len(r.tokens) - 1, multiple) for r in RESPONSES)
        held = held_by(micro.lengths, cp, cp_rank)
        for (n, place), token in zip(held, micro.tokens[0].tolist(), strict=True):
            whole = torch.cat([RESPONSES[n].prompt_tokens, RESPONSES[n].tokens])
            assert token == (whole[place] if place < len(whole) - 1 else 0)  # the last token is predicted, never fed
        for p, position in enumerate(micro.positions.tolist()):
            n, offset = int(micro.sequence[p]), int(micro.offset[p])
            response = RESPONSES[n]
            assert held[position] == (n, len(response.prompt_tokens) + offset - 1)  # the token before predicts it
            assert micro.targets[p] == response.tokens[offset]
            assert micro.rollout_log_prob[p] == response.log_probs[offset]
            assert micro.advantage[p] == response.advantage
            found.add((n, offset))
    assert found == {(n, offset) for n, response in enumerate(RESPONSES) for offset in range(len(response.tokens))}


@CP
def test_positions_of_the_ranks_are_disjoint_and_in_order(cp: int, multiple: int) -> None:
    micros = [pack(RESPONSES, cp=cp, cp_rank=rank, multiple=multiple) for rank in range(cp)]
    assert sum(len(micro.positions) for micro in micros) == sum(len(response.tokens) for response in RESPONSES)
    for micro in micros:
        assert len(set(micro.positions.tolist())) == len(micro.positions)
        places = list(zip(micro.sequence.tolist(), micro.offset.tolist(), strict=True))
        assert places == sorted(places)


@CP
def test_a_rank_without_responses_still_has_tokens_but_no_position(cp: int, multiple: int) -> None:
    for rank in range(cp):
        micro = pack([], cp=cp, cp_rank=rank, multiple=multiple)
        assert micro.tokens.shape == (1, multiple // cp)
        assert micro.lengths == (multiple,)
        assert (micro.targets.dtype, micro.positions.dtype, micro.advantage.dtype) == (torch.int64, torch.int64, torch.float32)
        for vector in (micro.positions, micro.targets, micro.sequence, micro.offset, micro.rollout_log_prob, micro.advantage):
            assert vector.numel() == 0
        assert micro.by_response(torch.empty(0)) == []


# ---- and back


def _back(micros: list[MicroBatch], groups: ForkGroups) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Log-probs and response tokens (as floats) by response, after a way through the micro-batches."""
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for micro in micros:
        log_probs = micro.by_response(micro.rollout_log_prob, groups.context)
        tokens = micro.by_response(micro.targets, groups.context)
        found.update({name(r): (a, b) for r, a, b in zip(micro.responses, log_probs, tokens, strict=True)})
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_return_to_their_responses(layout: str) -> None:
    returned = set()
    for found in on_layout(LAYOUTS[layout], _back, RESPONSES):
        for response in RESPONSES:
            if name(response) in found:  # whole, also where this rank held a part of its positions
                log_probs, tokens = found[name(response)]
                assert torch.equal(log_probs, response.log_probs)
                assert torch.equal(tokens, response.tokens.float())
        returned |= found.keys()
    assert returned == {name(response) for response in RESPONSES}


def test_padding_is_what_belongs_to_no_sequence() -> None:
    micro = pack(make_responses([(3, 4), (1, 1), (8, 1)]), multiple=8)
    assert micro.lengths == (8, 8, 8)
    assert micro.padding == 2 + 7 + 0


def test_responses_are_left_as_they_were() -> None:
    before = [replace(r, tokens=r.tokens.clone(), prompt_tokens=r.prompt_tokens.clone()) for r in RESPONSES]
    pack(RESPONSES, cp=2, cp_rank=0, multiple=8)
    for now, then in zip(RESPONSES, before, strict=True):
        assert torch.equal(now.tokens, then.tokens)
        assert torch.equal(now.prompt_tokens, then.prompt_tokens)


def test_the_forks_indices_follow_the_mask() -> None:
    micro = pack(RESPONSES)
    for mask in (torch.zeros(len(micro.positions), dtype=torch.bool), torch.arange(len(micro.positions)) % 3 == 1):
        micro.mask = mask
        for _ in range(2):
            assert torch.equal(micro.targets[micro.selected], micro.targets[mask])
            assert torch.equal(micro.selected_on_host, micro.selected)
            micro.mask |= micro.offset == 0  # in place
