"""One step's update of the policy: old log-probs and entropies, the forks and their weights, and training on each mini-batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache, partial

from megafork.parallel.reduce import from_last_stage
from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch
from megafork.rl.covariance import restrain
from megafork.rl.forks import ForkGroups, Selection, select_forks
from megafork.rl.loss import policy_loss, set_weights
from megafork.rl.mismatch import set_response_corrections
from megafork.rl.objectives import objective_named
from megafork.train.clock import Clock
from megafork.train.learner import Learner
from megafork.train.scoring import set_old
from megafork.train.summary import entropy_metrics, update_metrics

Check = Callable[[Mapping[str, float]], None]
_objective = cache(objective_named)  # a user's file is imported once, not at each step


def update_policy(
    learner: Learner, minibatches: list[list[MicroBatch]], recipe: Recipe, *, step: int, clock: Clock, check: Check | None = None
) -> dict[str, float]:
    """Update the policy once per mini-batch. Every rank must call, with the same number of mini-batches and of micro-batches in each.

    minibatches: this DP rank's, with advantages; their old log-probs, entropies, masks and weights are set on the last stage.
    check: called with the mismatch of the scored responses before the first update; if it raises, it must do so on every rank.
    Returns the metrics of entropies, forks and updates, the same on every rank.
    """
    mesh = learner.mesh
    groups = ForkGroups(mesh.token_group, mesh.cp_group)
    everything = list(itertools.chain(*minibatches))
    loss = partial(policy_loss, loss=recipe.loss, objective=_objective(recipe.loss.objective), context=mesh.cp_group)
    thresholds: list[Selection] = []
    updates: list[dict[str, float]] = []

    def select(micros: list[MicroBatch]) -> None:
        found = select_forks(micros, recipe.forks, groups, seed=recipe.run.seed, step=step) if mesh.is_last_stage else None
        thresholds.append(from_last_stage(found, mesh))

    compared = set_old(learner, everything, recipe, groups, step=step, clock=clock, first=check is not None)
    if check is not None:
        check(compared)
    logged = recipe.scores_everything or recipe.rollout.mismatch_responses  # or the first step after a resumption would log more
    if recipe.loss.kl.kept:
        with clock("reference"):
            learner.score_reference(everything)
    with clock("update"):
        metrics = entropy_metrics(everything, groups, mesh) | (compared if logged else {})
        if mesh.is_last_stage:
            set_response_corrections(everything, recipe.loss, mesh.cp_group)
        if recipe.forks.scope == "batch":
            select(everything)
        for mini in minibatches:
            if recipe.forks.entropy_from == "current" and updates:
                learner.score(mini, entropy_only=True)
            if recipe.forks.scope != "batch":
                select(mini)
            if mesh.is_last_stage:
                set_weights(mini, recipe.forks, recipe.loss, groups)
                restrain(mini, recipe.loss, groups, seed=recipe.run.seed, step=step)
            updates.append(learner.train(mini, loss, entropy_bonus=recipe.loss.entropy_bonus))
    return metrics | update_metrics(everything, thresholds, updates, mesh) | learner.expert_metrics()
