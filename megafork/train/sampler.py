"""Responses for a step: sampled, judged, and replaced if a prompt's responses are all right or all wrong (dynamic sampling)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megafork.data.prompts import Prompt, PromptOrder
from megafork.data.reward import Verdict, Verifiers, as_judged
from megafork.data.tokenizer import Tokenizer
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe, RecipeError
from megafork.recipe.kinds import shown
from megafork.rl.advantage import is_mixed, set_advantages
from megafork.rl.batch import Response
from megafork.rl.fork_temperature import fork_temperature
from megafork.rollout.engine import Completion, Engine, Request, Sampling, request_seed
from megafork.train.clock import marked
from megafork.train.dealing import Dealer


class Outcome(NamedTuple):
    """A response's metadata, known to every rank, wherever its tokens are."""

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
    """The step's responses that were sampled on this rank."""
    outcomes: list[Outcome] = field(default_factory=list)
    sampled: int = 0
    """Total responses sampled, kept or not."""
    sampled_accuracy: float = 0.0
    """Mean accuracy of all sampled responses, unbiased by dynamic sampling."""
    sampled_tokens: int = 0
    sampled_truncated: int = 0
    example: str = ""
    """The first prompt and the first response to it; "" on ranks that do not judge."""
    refills: int = 0
    errors: int = 0
    """Responses whose verifier raised, hung or died; they count as wrong."""
    first_error: str | None = None
    reward_seconds: float = 0.0
    busy_s: float = 0.0
    """Seconds spent generating, summed over the engines."""
    span_s: float = 0.0
    """The same sum if every engine had taken as long as the slowest."""
    state: dict[str, Any] = field(default_factory=dict)
    """The sampler's state afterwards, from which the next collection continues."""

    @property
    def groups(self) -> list[int]:
        return sorted({outcome.group for outcome in self.outcomes})


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts answered and judged, the same on every rank."""

    metrics: dict[str, float]
    accuracies: list[float]
    """Mean accuracy of each prompt's `eval.samples` responses, in the order of the prompts."""
    responses: int
    first_error: str | None
    """Why the first response that this rank's verifiers failed on could not be judged."""


class Sampler:
    """Draws a step's prompts and responses. Every rank creates one, and all call `collect` together; only an engine's first rank judges."""

    def __init__(
        self, recipe: Recipe, prompts: list[Prompt], engine: Engine, verifiers: Verifiers | None, tokenizer: Tokenizer, mesh: Mesh
    ) -> None:
        self.recipe = recipe
        self.order = PromptOrder(prompts, recipe.run.seed)
        self.dealer = Dealer()
        self.engine = engine
        self.verifiers = verifiers
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # its own: a thread may use it during training
        """Group of all ranks. The timeout is long because engines take different times, and have their own limits."""

    def collect(self, step: int) -> Collected:
        """Sample until `rollout.prompts` groups are kept or `rollout.max_refills` rounds are spent; sets the responses' advantages."""
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
            # later rounds sample enough prompts to fill the rest, judging by the share kept so far
            count = missing if round_ == 0 else min(spec.prompts, math.ceil(missing * asked * spec.samples / max(len(kept), 1)))
            prompts = self.order.take(count)
            held, busy_s = self._sample(prompts, first_group, step, done)
            outcomes = self._share(held, busy_s, done)
            self._learn(prompts, first_group, outcomes)
            first_group, asked, done.refills = first_group + count, asked + count, round_
            accuracy_sum += sum(outcome.accuracy for outcome in outcomes)
            done.sampled += len(outcomes)
            done.sampled_tokens += sum(outcome.tokens for outcome in outcomes)
            done.sampled_truncated += sum(outcome.truncated for outcome in outcomes)
            kept += self._mixed(outcomes) if spec.dynamic_sampling else outcomes
            mine += held
        done.sampled_accuracy = accuracy_sum / max(done.sampled, 1)
        done.state = self.state()
        self._keep(done, kept, mine)
        return done

    def _sample(self, prompts: Sequence[Prompt], first_group: int, step: int, done: Collected) -> tuple[list[Response], float]:
        """Judged responses to this rank's engine's prompts, empty except on the engine's first rank; and seconds generating."""
        spec, engine = self.recipe.rollout, self.engine
        ours = [(first_group + n, prompts[n]) for n in self.dealer.deal(prompts, engine.engines)[engine.number]]
        keys = [(group, prompt, sample) for group, prompt in ours for sample in range(spec.samples)]
        requests = [Request(p.tokens, request_seed(self.recipe.run.seed, step, group, p.index, sample)) for group, p, sample in keys]
        sampling = Sampling(
            spec.max_response_length,
            spec.temperature,
            stop=self.tokenizer.eos_ids,
            forks=fork_temperature(spec),
            entropies=self.recipe.forks.entropy_from == "rollout",
        )
        started = time.perf_counter()
        completions, texts, verdicts, waited = self._judged(requests, sampling, [prompt for _, prompt, _ in keys])
        busy_s = time.perf_counter() - started - waited
        if self.verifiers is None:
            return [], busy_s
        done.reward_seconds += waited
        if sampling.entropies and any(len(completion.entropies) != len(completion.tokens) for completion in completions):
            raise RecipeError(
                f"forks.entropy_from is rollout, but {type(engine).__name__} does not return each token's entropy: choose entropy_from=old"
            )
        if self.recipe.routing_from == "rollout" and any(completion.routing.dim() != 3 for completion in completions):
            raise RecipeError(
                f"rollout.routing is replay, but {type(engine).__name__} does not tell which experts it chose: choose routing=none"
            )
        failed = [verdict.error for verdict in verdicts if verdict.error]
        done.errors += len(failed)
        done.first_error = done.first_error or (failed[0] if failed else None)
        if texts and not done.example:
            done.example = f"the response to {shown(keys[0][1].text)} was {shown(texts[0])}"
        held = [
            Response(
                group=group,
                sample=sample,
                prompt=prompt.index,
                prompt_tokens=torch.tensor(prompt.tokens, dtype=torch.int32),
                tokens=torch.tensor(completion.tokens, dtype=torch.int32),
                log_probs=torch.tensor(completion.log_probs, dtype=torch.float32),
                versions=torch.tensor(completion.versions, dtype=torch.int32),
                entropies=torch.tensor(completion.entropies, dtype=torch.float32),
                routing=completion.routing,
                truncated=completion.truncated,
                accuracy=verdict.accuracy,
            )
            for (group, prompt, sample), completion, verdict in zip(keys, completions, verdicts, strict=True)
        ]
        return held, busy_s

    def _judged(
        self, requests: Sequence[Request], sampling: Sampling, prompts: Sequence[Prompt]
    ) -> tuple[list[Completion], list[str], list[Verdict], float]:
        """Completions, their texts, verdicts, and the seconds waited for the verdicts; empty except on the engine's first rank.

        Each response is judged as soon as it ends, while others are still being generated.
        """
        texts: dict[int, str] = {}
        begun: dict[int, Future[Verdict]] = {}

        def judge(place: int, completion: Completion) -> None:
            assert self.verifiers is not None
            texts[place] = self.tokenizer.decode(completion.tokens)
            seen = as_judged(texts[place], prompts[place].text, self.recipe.reward.verifier)
            begun[place] = self.verifiers.begin((seen, prompts[place].row))

        completions = self.engine.generate(requests, sampling, judge if self.verifiers else None)
        if self.verifiers is None:
            return [], [], [], 0.0
        started = time.perf_counter()
        with marked("reward"):
            for place in range(len(completions)):
                if place not in begun:  # the engine tells only at the end
                    judge(place, completions[place])
            verdicts = [begun[place].result() for place in range(len(completions))]
        return completions, [texts[place] for place in range(len(completions))], verdicts, time.perf_counter() - started

    def _share(self, held: list[Response], busy_s: float, done: Collected) -> list[Outcome]:
        set_advantages(held, self.recipe)
        mine = [
            Outcome(r.group, r.sample, self.mesh.rank, len(r.prompt_tokens), len(r.tokens), r.accuracy, r.reward, r.truncated) for r in held
        ]
        every: list[tuple[list[Outcome], float | None]] = [([], None) for _ in range(self.mesh.world)]
        dist.all_gather_object(every, (mine, busy_s if self.engine.rank == 0 else None), group=self.group)
        busy = [seconds for _, seconds in every if seconds is not None]
        done.busy_s, done.span_s = done.busy_s + sum(busy), done.span_s + len(busy) * max(busy)
        return sorted(outcome for part, _ in every for outcome in part)

    def _learn(self, prompts: Sequence[Prompt], first_group: int, outcomes: Sequence[Outcome]) -> None:
        """Tell the dealer how long the responses to these prompts were."""
        lengths: dict[int, list[int]] = {}
        for outcome in outcomes:
            lengths.setdefault(outcome.group - first_group, []).append(outcome.tokens)
        for place, prompt in enumerate(prompts):
            self.dealer.learn(prompt, lengths.get(place, []))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"order": self.order.state(), "lengths": self.dealer.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self.order.restore(state["order"])
        self.dealer.restore(state.get("lengths", {}))

    def _mixed(self, outcomes: list[Outcome]) -> list[Outcome]:
        accuracies: dict[int, list[float]] = {}
        for outcome in outcomes:
            accuracies.setdefault(outcome.group, []).append(outcome.accuracy)
        return [outcome for outcome in outcomes if is_mixed(accuracies[outcome.group])]

    def _keep(self, done: Collected, kept: list[Outcome], mine: list[Response]) -> None:
        """Keep the first `rollout.prompts` groups; under `reward.overlong: filter`, without their truncated responses."""
        groups = set(sorted({outcome.group for outcome in kept})[: self.recipe.rollout.prompts])
        drop_truncated = self.recipe.reward.overlong == "filter"
        done.outcomes = [o for o in kept if o.group in groups and not (drop_truncated and o.truncated)]
        done.responses = [r for r in mine if r.group in groups and not (drop_truncated and r.truncated)]

    def evaluate(self, prompts: list[Prompt]) -> Evaluation:
        """Accuracy on held-out prompts over `eval.samples` responses each, with the same seeds on every call. Every rank must call."""
        spec, engine = self.recipe.eval, self.engine
        ours = [(n, prompt) for n, prompt in enumerate(prompts) if n % engine.engines == engine.number]
        keys = [(n, prompt, sample) for n, prompt in ours for sample in range(spec.samples)]
        requests = [Request(prompt.tokens, request_seed(self.recipe.run.seed, -1, prompt.index, sample)) for _, prompt, sample in keys]
        sampling = Sampling(self.recipe.rollout.max_response_length, spec.temperature, spec.top_p, stop=self.tokenizer.eos_ids)
        completions, _, verdicts, _ = self._judged(requests, sampling, [prompt for _, prompt, _ in keys])
        first_error = None
        sums, right_of = torch.zeros(5, dtype=torch.float64), torch.zeros(len(prompts), dtype=torch.float64)
        if self.verifiers is not None:
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
