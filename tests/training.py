"""Three training steps on one fixed batch: on real ranks in any layout, and in float64 on transformers, one response at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megafork.model.qwen3 import build_policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Recipe, Rollout
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import set_weights
from megafork.rl.packing import packer, placement
from megafork.rollout.temperature import fork_temperature
from megafork.shape import read_shape
from megafork.train.loop import policy_loss
from megafork.train.summary import entropy_metrics, update_metrics
from megafork.train.update import Learner
from megafork.weights import policy_weights
from megafork.weights.huggingface import HuggingFaceWeights

STEPS = 3
GROUPS = ((0, 1), (2,))
"""Which prompts make each mini-batch."""


def responses(seed: int = 5, count: int = 12) -> list[Response]:
    """Four responses to each of three prompts, of 1 to 16 tokens after 1 to 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        lengths = torch.randint(1, 17, (2,), generator=generator).tolist()
        prompt, answer = (torch.randint(0, 99, (length,), generator=generator, dtype=torch.int32) for length in lengths)
        advantage = float(torch.randn((), generator=generator))
        written = -4.6 + torch.randn(lengths[1], generator=generator)  # about log 1/99, as the roll-out engine would have it
        made.append(Response(n // 4, n % 4, n // 4, prompt, answer, written, False, advantage=advantage))
    return made


class Rig:
    """A rank's learner with the weights of the recipe's model, and the steps that it takes."""

    def __init__(self, spec: Recipe) -> None:
        self.spec = spec
        self.mesh: Mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
        folder = Path(spec.model.path)
        self.shape = read_shape(folder)
        chunks = build_policy(self.shape, spec, self.mesh)
        policy_weights.load_policy(chunks, HuggingFaceWeights(folder), self.shape, self.mesh)
        self.learner = Learner(
            chunks, spec, self.mesh, updates=100, temperature=spec.rollout.temperature, forks=fork_temperature(spec.rollout)
        )
        self.groups = ForkGroups(self.mesh.token_group, self.mesh.cp_group)
        self.every = responses()

    def minibatches(self) -> Iterator[list[MicroBatch]]:
        pack = packer(self.spec, self.mesh)
        for groups in GROUPS:
            members = [r for r in self.every if r.group in groups]
            placed = placement([r.length for r in members], self.spec, self.mesh)[self.mesh.dp_rank]
            yield [pack([members[n] for n in micro]) for micro in placed]

    def step(self, number: int) -> tuple[dict[str, float], dict[tuple[int, ...], bool]]:
        """The step of `train.loop.Trainer` on the fixed batch: its metrics, and the mask of the tokens that this rank holds."""
        minibatches = list(self.minibatches())
        everything = list(itertools.chain(*minibatches))
        self.learner.score(everything)
        metrics = entropy_metrics(everything, self.groups, self.mesh)
        thresholds, updates, masks = [], [], {}
        for mini in minibatches:
            if self.mesh.is_last_stage:
                thresholds.append(select_forks(mini, self.spec.forks, self.groups, seed=1, step=number))
                set_weights(mini, self.spec.forks, self.spec.loss, self.groups)
                for micro in mini:
                    masks.update(_by_token(micro, number))
            updates.append(self.learner.train(mini, partial(policy_loss, loss=self.spec.loss)))
        from megafork.parallel.reduce import from_last_stage

        thresholds = from_last_stage(thresholds, self.mesh)
        return metrics | update_metrics(everything, thresholds, updates, self.mesh), masks

    def weights(self) -> dict[str, torch.Tensor]:
        self.learner.settle()
        return dict(policy_weights.export_policy(self.learner.chunks, self.shape, self.mesh))


def train_on_rank(specs: list[Recipe], plant: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """Three steps by each recipe, one after the other; `plant` may break something first."""
    if plant is not None:
        plant()
    results = []
    for spec in specs:
        rig = Rig(spec)
        steps = [rig.step(number) for number in range(STEPS)]
        masks = dict(itertools.chain(*(mask.items() for _, mask in steps)))
        results.append({"history": [metrics for metrics, _ in steps], "masks": masks, "weights": rig.weights()})
    return results


def _by_token(micro: MicroBatch, step: int) -> dict[tuple[int, ...], bool]:
    names = [(micro.responses[s].group, micro.responses[s].sample, o) for s, o in zip(micro.sequence, micro.offset, strict=True)]
    return {(step, g, s, int(o)): bool(m) for (g, s, o), m in zip(names, micro.mask, strict=True)}


def reference(spec: Recipe) -> dict[str, Any]:
    """The same steps in float64 on transformers with torch's AdamW."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(spec.model.path, dtype=torch.float64, attn_implementation="eager")
    o = spec.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    every, history, masks = responses(), [], {}
    for step in range(STEPS):
        with torch.no_grad():
            old = {(r.group, r.sample): _score_as_drawn(model, r, spec.rollout) for r in every}
        updates = []
        for groups_ in GROUPS:
            members = [r for r in every if r.group in groups_]
            entropies = torch.cat([old[r.group, r.sample][2] for r in members])
            k = math.ceil(len(entropies) * round(spec.forks.top_entropy_quantile * 1000) / 1000)
            tau = entropies.sort(descending=True).values[k - 1]
            total = int((entropies >= tau).sum())
            loss, clipped = torch.zeros((), dtype=torch.float64), 0
            for r in members:
                drawn_at, old_log_prob, entropy = old[r.group, r.sample]
                mask = entropy >= tau
                masks.update({(step, r.group, r.sample, n): bool(m) for n, m in enumerate(mask)})
                ratio = (_score(model, r, drawn_at)[0] - old_log_prob).exp()
                free, bound = -ratio * r.advantage, -ratio.clamp(0.8, 1.28) * r.advantage
                cap = spec.loss.importance_cap
                weight = 1.0 if cap is None else (old_log_prob - r.log_probs).exp().clamp(max=cap)
                loss = loss + (torch.maximum(free, bound) * weight * mask).sum() / total
                clipped += int(((bound > free) & mask).sum())
            adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
            adam.step()
            updates.append((loss.item(), float(norm), float(tau), clipped, total))
        losses, norms, taus, clips, totals = zip(*updates, strict=True)
        history.append(
            {
                "loss/policy": sum(losses) / len(losses),
                "grad_norm": sum(norms) / len(norms),
                "forks/tau": sum(taus) / len(taus),
                "loss/clip_fraction": sum(clips) / sum(totals),
                "entropy/mean": float(torch.cat([entropy for *_, entropy in old.values()]).mean()),
            }
        )
    return {"history": history, "masks": masks, "weights": {n: p.detach() for n, p in model.state_dict().items()}}


def _score_as_drawn(model: Any, r: Response, rollout: Rollout) -> tuple[float | torch.Tensor, torch.Tensor, torch.Tensor]:
    """The temperature of each token, [n, 1], or the one of all; log-probs at it; entropies, at 1 where tokens differ in temperature."""
    if rollout.fork_temperature is None:
        return rollout.temperature, *_score(model, r, rollout.temperature)
    low, high, threshold = rollout.fork_temperature
    entropy = _score(model, r, 1.0)[1]
    drawn_at = torch.where(entropy > threshold, high, low)[:, None]
    return drawn_at, _score(model, r, drawn_at)[0], entropy


def _score(model: Any, r: Response, temperature: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([r.prompt_tokens, r.tokens]).long()
    logits = model(ids[None]).logits[0, len(r.prompt_tokens) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, r.tokens.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
