"""Before a step's updates: each token's old log-prob and entropy, from the trainer or from the roll-out, and how much the two differ.

`forks.entropy_from` and `loss.old_log_prob` name the sources. If either is the trainer, it scores every response; if not, only a sample.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.packing import packer, plan_in_place
from megafork.rollout.engine import request_seed
from megafork.train.clock import Clock
from megafork.train.learner import Learner
from megafork.train.summary import mismatch_metrics

FIRST = 16
"""Responses that the first step scores where others score none, to check that roll-out and trainer compute the same model."""


def set_old(
    learner: Learner, micros: list[MicroBatch], recipe: Recipe, groups: ForkGroups, *, step: int, clock: Clock, first: bool
) -> dict[str, float]:
    """Set `old_log_prob` and `entropy` of a step's micro-batches (last stage). Every rank must call, with as many micro-batches.

    first: whether the trainer must score some responses even if `rollout.mismatch_responses` is 0. Times `score`, if it scores all, or
    `compare`. Returns the metrics `rollout_mismatch/*` of the scored responses, the same on every rank; {} if there are none.
    """
    metrics: dict[str, float] = {}
    if recipe.scores_everything:
        with clock("score"):
            learner.score(micros)
            metrics = _mismatch(micros, recipe, groups, learner.mesh, step)
    elif count := recipe.rollout.mismatch_responses or (FIRST if first else 0):
        with clock("compare"):
            scored = sample(micros, count, recipe, learner.mesh, step)
            learner.score(scored)
            metrics = _mismatch(scored, recipe, groups, learner.mesh, step)
    for micro in micros:
        if recipe.forks.entropy_from == "rollout":
            micro.entropy = micro.rollout_entropy
        if recipe.loss.old_log_prob == "rollout" or not recipe.scores_everything:  # under `current` only for the files and the log
            micro.old_log_prob = micro.rollout_log_prob
    return metrics


def sample(micros: list[MicroBatch], count: int, recipe: Recipe, mesh: Mesh, step: int) -> list[MicroBatch]:
    """`count` of the step's responses (or all, if there are fewer), packed anew on the DP ranks that hold them.

    The choice depends only on (run seed, step, group, sample), so it is the same for every layout. Every rank must call.
    """
    mine = {request_seed(recipe.run.seed, step, r.group, r.sample): r for micro in micros for r in micro.responses}
    told = [(key, mine[key].length, mesh.dp_rank) for key in sorted(mine)[:count]]
    every: list[list[tuple[int, int, int]]] = [[] for _ in range(mesh.world)]
    dist.all_gather_object(every, told)
    keys, lengths, dp_ranks = zip(*sorted({one for part in every for one in part})[:count], strict=True)
    layout = mesh.layout
    plan = plan_in_place(lengths, dp_ranks, mesh.dp, recipe.micro_batch_tokens, layout.sequence_multiple, layout.micro_batch_multiple)
    packed = packer(mesh, whole=recipe.micro_batch_padding, temperature=recipe.rollout.temperature)
    chosen: list[list[Response]] = [[mine[keys[n]] for n in members] for members in plan[mesh.dp_rank]]
    return [packed(members) for members in chosen]


def _mismatch(micros: list[MicroBatch], recipe: Recipe, groups: ForkGroups, mesh: Mesh, step: int) -> dict[str, float]:
    forks: list[tuple[Tensor, Tensor]] = []
    if recipe.forks.entropy_from == "rollout" and mesh.is_last_stage:
        ours, theirs = [replace(micro) for micro in micros], [replace(micro, entropy=micro.rollout_entropy) for micro in micros]
        if recipe.loss.old_log_prob != "score":  # which some rules read
            theirs = [replace(micro, old_log_prob=micro.rollout_log_prob) for micro in theirs]
        for either in (ours, theirs):
            select_forks(either, recipe.forks, groups, seed=recipe.run.seed, step=step)
        forks = [(one.fork, other.fork) for one, other in zip(ours, theirs, strict=True)]
    return mismatch_metrics(micros, forks, mesh)
