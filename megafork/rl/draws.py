"""Random numbers that belong to a token or a response, not to a rank: the same for every parallel layout.

They depend only on the run's seed, the step and the name of what they are drawn for, mixed with splitmix64's finaliser.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from megafork.parallel.to_device import to_device
from megafork.rl.batch import MicroBatch

_OF_A_RESPONSE = 1 << 40
"""In place of an offset: no token has it."""
_Word = TypeVar("_Word", int, Tensor)
"""A signed number of 64 bits, or an int64 tensor of them; of many responses, one number at a time is far quicker to mix."""


def of_tokens(micro: MicroBatch, seed: int, step: int) -> Tensor:
    """fp32 [P] in [0, 1), one number per position, by (seed, step, group, sample, offset)."""
    names = to_device(torch.tensor([[r.group, r.sample] for r in micro.responses] or [[0, 0]]), micro.offset.device)
    return _uniform(seed, step, names[micro.sequence, 0], names[micro.sequence, 1], micro.offset)


def of_response(group: int, sample: int, seed: int, step: int) -> float:
    """A number in [0, 1) by (seed, step, group, sample), independent of those of its tokens."""
    return _upper_bits(seed ^ (step << 32), group, sample, _OF_A_RESPONSE) / (1 << 24)


def _uniform(seed: int, step: int, *parts: Tensor) -> Tensor:
    return _upper_bits(torch.full_like(parts[0], seed) ^ (step << 32), *parts).float() / (1 << 24)


def _upper_bits(start: _Word, *parts: _Word) -> _Word:
    """24 bits mixed from all of these."""
    mixed = _mix(start)
    for part in parts:
        mixed = _mix(mixed + part)
    return _shift(mixed, 40)


def _mix(x: _Word) -> _Word:
    x = _wrapped(x + _wrapped(0x9E3779B97F4A7C15))
    x = _wrapped((x ^ _shift(x, 30)) * _wrapped(0xBF58476D1CE4E5B9))
    x = _wrapped((x ^ _shift(x, 27)) * _wrapped(0x94D049BB133111EB))
    return x ^ _shift(x, 31)


def _shift(x: _Word, bits: int) -> _Word:
    """Logical right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(x: _Word) -> _Word:
    """A Python number as one of 64 bits; a tensor's already are."""
    return x if isinstance(x, Tensor) else (x + (1 << 63)) % (1 << 64) - (1 << 63)
