"""Random numbers that belong to a token or a response, not to a rank: the same for every parallel layout.

They depend only on the run's seed, the step and the name of what they are drawn for, mixed with splitmix64's finaliser.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megafork.parallel.to_device import to_device
from megafork.rl.batch import MicroBatch

_OF_A_RESPONSE = 1 << 40
"""In place of an offset: no token has it."""
_WORD = (1 << 64) - 1


def of_tokens(micro: MicroBatch, seed: int, step: int) -> Tensor:
    """fp32 [P] in [0, 1), one number per position, by (seed, step, group, sample, offset)."""
    names = to_device(torch.tensor([[r.group, r.sample] for r in micro.responses] or [[0, 0]]), micro.offset.device)
    return _uniform(seed, step, names[micro.sequence, 0], names[micro.sequence, 1], micro.offset)


def of_response(group: int, sample: int, seed: int, step: int) -> float:
    """A number in [0, 1) by (seed, step, group, sample), independent of those of its tokens."""
    mixed = _mixed((seed ^ (step << 32)) & _WORD)
    for part in (group, sample, _OF_A_RESPONSE):
        mixed = _mixed((mixed + part) & _WORD)
    return (mixed >> 40) / (1 << 24)


def _mixed(x: int) -> int:
    """`_mix` of one number, below 2^64."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def _uniform(seed: int, step: int, *parts: Tensor) -> Tensor:
    mixed = _mix(torch.full_like(parts[0], seed) ^ (step << 32))
    for part in parts:
        mixed = _mix(mixed + part)
    return (mixed >> 40 & 0xFFFFFF).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
