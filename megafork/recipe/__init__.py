"""The recipe: one YAML file that specifies a whole run.

Every key is declared and described in the file of its section; `recipe_file.py` reads a recipe. Paths in a recipe are relative to the
directory in which the command runs.

This package imports neither torch nor megatron, so that a wrong recipe is rejected in a fraction of a second.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import model_validator

from megafork.recipe.data import Data, Reward
from megafork.recipe.kinds import Key, RecipeError, Section, calling
from megafork.recipe.model import Model, Parallel, Precision
from megafork.recipe.objective import Forks, Loss, Optimizer
from megafork.recipe.rollout import Rollout
from megafork.recipe.run import Checkpoint, Eval, Log, Profile, Run, Train

__all__ = [
    "Checkpoint",
    "Data",
    "Eval",
    "Forks",
    "Key",
    "Log",
    "Loss",
    "Model",
    "Optimizer",
    "Parallel",
    "Precision",
    "Profile",
    "Recipe",
    "RecipeError",
    "Reward",
    "Rollout",
    "Run",
    "Train",
    "calling",
]


class Recipe(Section):
    """One run. Each section documents its keys."""

    run: Run = Run()
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    forks: Forks = Forks()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.rollout.prompts % self.train.minibatches:
            raise ValueError(
                f"train.minibatches is {self.train.minibatches} but rollout.prompts is {self.rollout.prompts}: "
                "choose a number of mini-batches that divides the prompts"
            )
        ratio_corrects = self.loss.old_log_prob == "rollout" and self.loss.objective != "reinforce"
        inexact = {
            "precision.rollout_fp8": self.precision.rollout_fp8,
            "rollout.staleness": self.rollout.staleness,
            "rollout.engine.kv_cache_dtype": self.rollout.cache_is_quantised and self.rollout.engine["kv_cache_dtype"],
        }
        for key, value in inexact.items():
            if value and self.loss.importance_cap is None and not (self.loss.mismatch.masks or ratio_corrects):
                raise ValueError(
                    f"{key} is {str(value).lower()} without loss.importance_cap: tokens would count as if the newest weights in full "
                    f"precision had drawn them; set loss.importance_cap=2, or leave {key} out"
                )
        if self.forks.select == "prefix" and self.loss.ratios_of_responses:
            key, bound = next(iter(self.loss.ratios_of_responses.items()))
            raise ValueError(
                f"loss.{key} is {bound} with forks.select=prefix: the ratio of a response needs all its tokens, and the last are cut off; "
                "choose loss.mismatch.token_mask or another forks.select"
            )
        if self.reward.overlong == "shaping" and self.reward.overlong_buffer > self.rollout.max_response_length:
            raise ValueError(
                f"reward.overlong_buffer is {self.reward.overlong_buffer} but rollout.max_response_length is "
                f"{self.rollout.max_response_length}: choose a smaller buffer, or reward.overlong=none"
            )
        if self.train.micro_batch_tokens is not None and self.train.micro_batch_tokens < self.longest_padded:
            raise ValueError(
                f"train.micro_batch_tokens is {self.train.micro_batch_tokens} but one sequence may have {self.longest_padded} tokens "
                "(data.max_prompt_length + rollout.max_response_length, padded for cp and sp): raise it to at least that"
            )
        if self.model.kernels == "fused" and self.precision.dtype == "fp32":
            raise ValueError(
                "model.kernels is fused with precision.dtype=fp32: Transformer Engine's attention takes bf16; set dtype=bf16, or "
                "kernels=plain"
            )
        if self.model.kernels != "auto" and (problem := self.parallel.cp_comm_problem(fused=self.model.kernels == "fused")):
            raise ValueError(problem)
        if self.log.profile is not None and (last := max(self.log.profile.steps)) > self.train.steps:
            raise ValueError(f"log.profile.steps has {last} but train.steps is {self.train.steps}: choose steps that the run has")
        return self

    @model_validator(mode="after")
    def _sources_agree(self) -> Recipe:
        """Where entropies and old log-probs come from."""
        if self.forks.entropy_from == "rollout" and self.rollout.fork_temperature:
            raise ValueError(
                "forks.entropy_from is rollout with rollout.fork_temperature: the engine's entropies are at each token's own temperature, "
                "those that select forks at 1; choose entropy_from=old"
            )
        if self.routing_from == "score" and not self.scores_everything:
            raise ValueError(
                "rollout.routing is replay with rollout.servers and no scoring pass: servers do not tell which experts they chose, and "
                "nothing else does; set loss.old_log_prob=score, or routing=none"
            )
        if self.loss.old_log_prob == "current" and self.train.minibatches > 1:
            raise ValueError(
                f"loss.old_log_prob is current with train.minibatches={self.train.minibatches}: after the first update the ratio would "
                "still be 1 although the policy has moved; set train.minibatches=1, or old_log_prob=rollout"
            )
        if self.loss.old_log_prob == "rollout" and self.loss.mismatch.masks:
            raise ValueError(
                "loss.mismatch has a mask with loss.old_log_prob=rollout: p_old / p_rollout is 1, so nothing is outside; leave it out, or "
                "set old_log_prob=score"
            )
        if self.loss.old_log_prob == "current" and self.loss.ratios_of_responses:
            key, value = next(iter(self.loss.ratios_of_responses.items()))
            raise ValueError(
                f"loss.{key} is {value} with loss.old_log_prob=current: the ratio of a response needs all its tokens' log-probs, and an "
                "update computes those of the forks; set old_log_prob=score"
            )
        if self.loss.old_log_prob == "rollout" and self.loss.importance_cap is not None:
            raise ValueError(
                f"loss.importance_cap is {self.loss.importance_cap} with loss.old_log_prob=rollout: p_old / p_rollout is 1, and the ratio "
                "already corrects; leave importance_cap out, or set old_log_prob=score"
            )
        return self

    @model_validator(mode="after")
    def _penalties_apply(self) -> Recipe:
        kl = self.loss.kl
        for key, value in {"loss.clip_rest": self.loss.clip_rest, "loss.kl.rest_coef": kl.rest_coef}.items():
            if value is not None and not self.forks.rest_weight:
                raise ValueError(f"{key} is {value} with forks.rest_weight=0: tokens that are not selected have no loss; set rest_weight=1")
        if self.loss.kl_cov is not None and self.train.minibatches == 1 and self.loss.old_log_prob != "rollout":
            raise ValueError(
                f"loss.kl_cov is {list(self.loss.kl_cov)} with train.minibatches=1: at a step's first update the policy is p_old, and the "
                "penalty has no gradient; raise train.minibatches, or use loss.clip_cov"
            )
        if kl.kept and self.rollout.fork_temperature:
            raise ValueError(
                f"loss.kl.coef is {kl.coef} with rollout.fork_temperature: the reference has no temperature of its own; leave one out"
            )
        if kl.kept and self.precision.train_fp8:
            raise ValueError(
                f"loss.kl.coef is {kl.coef} with precision.train_fp8: the reference's weights would pass through the policy's FP8 copies; "
                "leave one of them out"
            )
        return self

    @property
    def routing_from(self) -> Literal["rollout", "score"] | None:
        """What chooses the experts of each token for the whole step; None: every forward anew."""
        if self.rollout.routing == "none":
            return None
        return "score" if self.rollout.servers else "rollout"

    @property
    def scores_everything(self) -> bool:
        """Whether a step needs the trainer's own log-probs or entropies of all responses before its first update."""
        return self.loss.old_log_prob == "score" or self.forks.entropy_from != "rollout"

    @property
    def longest_sequence(self) -> int:
        """Tokens in the longest prompt and response together."""
        return self.data.max_prompt_length + self.rollout.max_response_length

    @property
    def longest_padded(self) -> int:
        """`longest_sequence`, padded as the layout requires."""
        return self.parallel.padded(self.longest_sequence)

    @property
    def micro_batch_tokens(self) -> int:
        return self.train.micro_batch_tokens or self.longest_padded

    @property
    def micro_batch_padding(self) -> int:
        """Multiple to which a packed micro-batch is padded: in FP8 each rank's share of its tokens is a multiple of 128."""
        return 128 * self.parallel.cp * (self.parallel.tp if self.parallel.sp else 1) if self.precision.train_fp8 else 1

    @property
    def run_folder(self) -> Path:
        return Path(os.path.expanduser(self.run.folder)) / self.run.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=140)
