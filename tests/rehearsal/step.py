"""The waits of a step, and how many each micro-batch adds."""

from __future__ import annotations

from dataclasses import dataclass

from training import Rig

from megafork.recipe import Recipe
from rehearsal.ledger import Ledger
from rehearsal.machine import rehearse
from rehearsal.tensors import DEVICE


@dataclass(frozen=True)
class Waits:
    ledger: Ledger
    """Events of one step, including packing."""
    each: float
    """Waits that a micro-batch adds to a step."""


def waits_of(spec: Recipe) -> Waits:
    """Rehearse a second step, once with the recipe's micro-batches and once with more, smaller ones. Every rank must call, in a fork."""
    noted = rehearse()
    smaller = spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch_tokens": spec.micro_batch_tokens // 2})})
    (few, ledger), (many, other) = (_second_step(one, noted) for one in (spec, smaller))
    assert many > few
    return Waits(ledger, (len(other.of("wait", "pageable")) - len(ledger.of("wait", "pageable"))) / (many - few))


def _second_step(spec: Recipe, ledger: Ledger) -> tuple[int, Ledger]:
    """The step's number of micro-batches, and its events."""
    rig = Rig(spec, DEVICE)
    rig.update(0)
    with ledger.during() as noted:
        minibatches = rig.update(1)[0]
    return sum(map(len, minibatches)), noted
