"""Responses for a step: sampled, judged, and sampled again where a prompt's responses are all right or all wrong (dynamic sampling)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from megafork.data.prompts import Prompt, PromptOrder
from megafork.data.reward import Verifiers
from megafork.data.tokenizer import Tokenizer
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe
from megafork.recipe.kinds import shown
from megafork.rl.advantage import is_mixed, set_advantages
from megafork.rl.batch import Response
from megafork.rl.fork_temperature import fork_temperature
from megafork.rollout.engine import Engine, Request, Sampling, request_seed
from megafork.train.clock import marked


class Outcome(NamedTuple):
    """What every rank knows of every response, wherever its tokens are."""

    group: int
    sample: int
    owner: int
    """The rank that sampled it and holds its tokens."""
    prompt_tokens: int
    tokens: int
    accuracy: float
    reward: float
    truncated: bool


@dataclass
class Collected:
    """A step's responses. `outcomes` is the same on every rank, in the order of (group, sample)."""

    responses: list[Response] = field(default_factory=list)
    """Those that this rank sampled and the step keeps."""
    outcomes: list[Outcome] = field(default_factory=list)
    sampled: int = 0
    """Responses sampled in all, kept or not."""
    sampled_accuracy: float = 0.0
    """Mean accuracy of all of them: dynamic sampling does not flatter it."""
    sampled_tokens: int = 0
    sampled_truncated: int = 0
    example: str = ""
    """The first prompt and the first response to it; empty on ranks that judge nothing."""
    refills: int = 0
    errors: int = 0
    """Responses whose verifier raised, hung or died; they count as wrong."""
    first_error: str | None = None
    reward_seconds: float = 0.0
    order: dict[str, int] = field(default_factory=dict)
    """State of the prompts' order after it: where the next collection goes on."""

    @property
    def groups(self) -> list[int]:
        return sorted({outcome.group for outcome in self.outcomes})


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts answered and judged, the same on every rank."""

    metrics: dict[str, float]
    accuracies: list[float]
    """Each prompt's, in their order: the mean over its `eval.samples` responses."""
    responses: int
    first_error: str | None
    """Why a response could not be judged, for the first that this rank's verifiers failed on."""


class Sampler:
    """Draws a step's prompts and responses. Every rank makes one and calls `collect` together; only an engine's first rank judges."""

    def __init__(
        self, recipe: Recipe, prompts: list[Prompt], engine: Engine, verifiers: Verifiers | None, tokenizer: Tokenizer, mesh: Mesh
    ) -> None:
        self.recipe = recipe
        self.order = PromptOrder(prompts, recipe.run.seed)
        self.engine = engine
        self.verifiers = verifiers
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # its own: it may be used in a thread beside the training
        """Of all ranks. The timeout is long because engines take different times, and have limits of their own."""

    def collect(self, step: int) -> Collected:
        """Sample until `rollout.prompts` groups are kept or `rollout.max_refills` rounds were spent; their advantages are set."""
        spec = self.recipe.rollout
        done = Collected()
        kept: list[Outcome] = []
        mine: list[Response] = []
        asked = first_group = 0
        accuracy_sum = 0.0
        for round_ in range(1 + (spec.max_refills if spec.dynamic_sampling else 0)):
            missing = spec.prompts - len(kept) // spec.samples
            if missing == 0:
                break
            # later rounds ask for as many prompts as the share kept so far suggests
            count = missing if round_ == 0 else min(spec.prompts, math.ceil(missing * asked * spec.samples / max(len(kept), 1)))
            prompts = self.order.take(count)
            held = self._sample(prompts, first_group, step, done)
            outcomes = self._share(held)
            first_group, asked, done.refills = first_group + count, asked + count, round_
            accuracy_sum += sum(outcome.accuracy for outcome in outcomes)
            done.sampled += len(outcomes)
            done.sampled_tokens += sum(outcome.tokens for outcome in outcomes)
            done.sampled_truncated += sum(outcome.truncated for outcome in outcomes)
            kept += self._mixed(outcomes) if spec.dynamic_sampling else outcomes
            mine += held
        done.sampled_accuracy = accuracy_sum / max(done.sampled, 1)
        done.order = self.order.state()
        self._keep(done, kept, mine)
        return done

    def _sample(self, prompts: Sequence[Prompt], first_group: int, step: int, done: Collected) -> list[Response]:
        """Responses of the prompts that fall to this rank's engine, judged; empty but on the engine's first rank."""
        spec, engine = self.recipe.rollout, self.engine
        ours = [(first_group + n, prompt) for n, prompt in enumerate(prompts) if n % engine.engines == engine.number]
        keys = [(group, prompt, sample) for group, prompt in ours for sample in range(spec.samples)]
        requests = [Request(p.tokens, request_seed(self.recipe.run.seed, step, group, p.index, sample)) for group, p, sample in keys]
        sampling = Sampling(spec.max_response_length, spec.temperature, stop=self.tokenizer.eos_ids, forks=fork_temperature(spec))
        completions = engine.generate(requests, sampling)
        if self.verifiers is None:
            return []
        texts = [self.tokenizer.decode(completion.tokens) for completion in completions]
        started = time.perf_counter()
        with marked("reward"):
            verdicts = self.verifiers.score([(text, prompt.row) for text, (_, prompt, _) in zip(texts, keys, strict=True)])
        done.reward_seconds += time.perf_counter() - started
        failed = [verdict.error for verdict in verdicts if verdict.error]
        done.errors += len(failed)
        done.first_error = done.first_error or (failed[0] if failed else None)
        if texts and not done.example:
            done.example = f"the response to {shown(keys[0][1].text)} was {shown(texts[0])}"
        return [
            Response(
                group=group,
                sample=sample,
                prompt=prompt.index,
                prompt_tokens=torch.tensor(prompt.tokens, dtype=torch.int32),
                tokens=torch.tensor(completion.tokens, dtype=torch.int32),
                log_probs=torch.tensor(completion.log_probs, dtype=torch.float32),
                versions=torch.tensor(completion.versions, dtype=torch.int32),
                truncated=completion.truncated,
                accuracy=verdict.accuracy,
            )
            for (group, prompt, sample), completion, verdict in zip(keys, completions, verdicts, strict=True)
        ]

    def _share(self, held: list[Response]) -> list[Outcome]:
        set_advantages(held, self.recipe)
        mine = [
            Outcome(r.group, r.sample, self.mesh.rank, len(r.prompt_tokens), len(r.tokens), r.accuracy, r.reward, r.truncated) for r in held
        ]
        every: list[list[Outcome]] = [[] for _ in range(self.mesh.world)]
        dist.all_gather_object(every, mine, group=self.group)
        return sorted(outcome for part in every for outcome in part)

    def _mixed(self, outcomes: list[Outcome]) -> list[Outcome]:
        accuracies: dict[int, list[float]] = {}
        for outcome in outcomes:
            accuracies.setdefault(outcome.group, []).append(outcome.accuracy)
        return [outcome for outcome in outcomes if is_mixed(accuracies[outcome.group])]

    def _keep(self, done: Collected, kept: list[Outcome], mine: list[Response]) -> None:
        """The first `rollout.prompts` groups; under `reward.overlong: filter` without their truncated responses."""
        groups = set(sorted({outcome.group for outcome in kept})[: self.recipe.rollout.prompts])
        drop_truncated = self.recipe.reward.overlong == "filter"
        done.outcomes = [o for o in kept if o.group in groups and not (drop_truncated and o.truncated)]
        done.responses = [r for r in mine if r.group in groups and not (drop_truncated and r.truncated)]

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """Accuracy on held-out prompts over `eval.samples` responses each, with the same seeds at every call. Every rank must call."""
        spec, engine = self.recipe.eval, self.engine
        ours = [(n, prompt) for n, prompt in enumerate(prompts) if n % engine.engines == engine.number]
        keys = [(n, prompt, sample) for n, prompt in ours for sample in range(spec.samples)]
        requests = [Request(prompt.tokens, request_seed(self.recipe.run.seed, -1, prompt.index, sample)) for _, prompt, sample in keys]
        sampling = Sampling(self.recipe.rollout.max_response_length, spec.temperature, spec.top_p, stop=self.tokenizer.eos_ids)
        completions = engine.generate(requests, sampling)
        first_error = None
        sums, right_of = torch.zeros(5, dtype=torch.float64), torch.zeros(len(prompts), dtype=torch.float64)
        if self.verifiers is not None:
            texts = [self.tokenizer.decode(completion.tokens) for completion in completions]
            verdicts = self.verifiers.score([(text, prompt.row) for text, (_, prompt, _) in zip(texts, keys, strict=True)])
            for (n, _, _), verdict in zip(keys, verdicts, strict=True):
                right_of[n] += verdict.accuracy
            sums[0] = len(completions)
            sums[1] = sum(verdict.accuracy for verdict in verdicts)
            sums[2] = sum(len(completion.tokens) for completion in completions)
            sums[3] = sum(completion.truncated for completion in completions)
            sums[4] = sum(verdict.error is not None for verdict in verdicts)
            first_error = next((verdict.error for verdict in verdicts if verdict.error), None)
        dist.all_reduce(sums, group=self.group)
        dist.all_reduce(right_of, group=self.group)
        count, right, tokens, truncated, errors = sums.tolist()
        metrics = {
            "eval/accuracy": right / count,
            "eval/response_length": tokens / count,
            "eval/truncated": truncated / count,
            "eval/errors": errors,
        }
        return Evaluation(metrics, (right_of / spec.samples).tolist(), int(count), first_error)
