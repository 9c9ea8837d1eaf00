"""The steps of `training.py` in float64 on transformers, one response at a time."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import routed
import torch
from tiny import published
from training import GROUPS, STEPS, Masks, responses

from megafork.recipe import Forks, Loss, Recipe, Rollout
from megafork.rl import prefix
from megafork.rl.batch import Response
from megafork.rl.packing import plan
from megafork.shape import read_shape


def reference(spec: Recipe, dp: int = 1, steps: int = STEPS) -> dict[str, Any]:
    """The same steps in float64 on transformers with torch's AdamW. `dp` counts where micro-batches do: `scope: microbatch`,
    `reduction: official`."""
    import transformers

    how = {"dtype": torch.float64, "attn_implementation": "eager"}
    if read_shape(Path(spec.model.path)).moe is not None:
        how["experts_implementation"] = "eager"  # the grouped product knows no float64
    model = transformers.AutoModelForCausalLM.from_pretrained(spec.model.path, **how)
    o = spec.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    if spec.routing_from:
        routed.let_routers_be_told(model)
    with torch.no_grad():
        start = {_name(r): _score(model, r, spec.rollout.temperature)[0] for r in responses()} if spec.loss.kl.coef else {}
    history, masks = [], {}
    for step in range(steps):
        every = [prefix.cut(r, spec, step=step) for r in routed.given(responses(), spec)]
        if spec.routing_from == "score":
            every = [replace(r, routing=routed.chosen(model, r)) for r in every]
        with torch.no_grad():
            old = {_name(r): _score_as_drawn(model, r, spec.rollout) for r in every}
        entropies = {name: entropy for name, (*_, entropy) in old.items()}
        batch_tau = _tau([entropies[_name(r)] for r in every], spec)
        updates: list[tuple[float, ...]] = []
        for groups_ in GROUPS:
            micros = _micro_batches([r for r in every if r.group in groups_], spec, dp)
            if spec.forks.entropy_from == "current" and updates:
                with torch.no_grad():
                    entropies |= {_name(r): _score_as_drawn(model, r, spec.rollout)[2] for micro in micros for r in micro}
            taus = [batch_tau] * len(micros)
            if spec.forks.scope != "batch":
                shared = [list(itertools.chain(*micros))] * len(micros) if spec.forks.scope == "minibatch" else micros
                taus = [_tau([entropies[_name(r)] for r in members], spec) for members in shared]
            if spec.forks.select == "top":
                chosen = {_name(r): entropies[_name(r)] >= tau for micro, tau in zip(micros, taus, strict=True) for r in micro}
            else:
                log_probs = {name: log_prob for name, (_, log_prob, _) in old.items()}
                chosen = by_rule(spec.forks, list(itertools.chain(*micros)), entropies, log_probs)
            weights = _weights(micros, chosen, spec)
            covariant = _covariant(spec.loss, list(itertools.chain(*micros)), entropies, old)
            if spec.loss.clip_cov is not None:
                weights = {name: weight * ~covariant[name] for name, weight in weights.items()}
            loss, clipped, learned = torch.zeros((), dtype=torch.float64), 0, 0
            for r in itertools.chain(*micros):
                drawn_at, old_log_prob, _ = old[_name(r)]
                fork = chosen[_name(r)]
                masked = fork | bool(spec.forks.rest_weight)
                masks.update({(step, *_name(r), n): bool(m) for n, m in enumerate(masked)})
                log_prob, entropy = _score(model, r, drawn_at)
                value, held_back = _objective(spec, log_prob, old_log_prob, r.advantage, masked, fork)
                value = value * correction(spec.loss, (old_log_prob - r.log_probs).tolist()) - spec.loss.entropy_bonus * entropy
                if start:
                    kl, d = spec.loss.kl, start[_name(r)][: len(log_prob)] - log_prob
                    beta = torch.where(fork, kl.coef, kl.coef if kl.rest_coef is None else kl.rest_coef)
                    value = value + beta * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[kl.estimator]
                if spec.loss.kl_cov is not None:
                    ratio = (log_prob - old_log_prob).exp()
                    value = value + spec.loss.kl_cov[1] * covariant[_name(r)] * (ratio - 1 - ratio.log())
                loss = loss + (value * weights[_name(r)]).sum()
                learned += int(masked.sum())
                clipped += int((held_back & masked).sum())
            balance = _imbalance(model, list(itertools.chain(*micros))) if spec.loss.expert_balance else torch.zeros(())
            adam.zero_grad()
            (loss + spec.loss.expert_balance * balance).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
            adam.step()
            updates.append((loss.item(), float(norm), float(sum(taus) / len(taus)), clipped, learned))
        losses, norms, mean_taus, clips, totals = zip(*updates, strict=True)
        history.append(
            {
                "loss/policy": sum(losses) / len(losses),
                "grad_norm": sum(norms) / len(norms),
                "forks/tau": sum(mean_taus) / len(mean_taus) if spec.forks.select == "top" else math.nan,
                "loss/clip_fraction": sum(clips) / sum(totals),
                "entropy/mean": float(torch.cat([entropy for *_, entropy in old.values()]).mean()),
            }
        )
    return {"history": history, "masks": masks, "weights": dict(published(model))}


def _objective(
    spec: Recipe, log_prob: torch.Tensor, old: torch.Tensor, advantage: float, chosen: torch.Tensor, fork: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token of a response, and which its bounds hold back; the ratio of `gspo` is that of the chosen tokens."""
    loss, ratio = spec.loss, (log_prob - old).exp()
    low, high = torch.full_like(ratio, 1 - loss.clip_low), torch.full_like(ratio, 1 + loss.clip_high)
    if loss.clip_rest is not None:
        low, high = torch.where(fork, low, 1 - loss.clip_rest[0]), torch.where(fork, high, 1 + loss.clip_rest[1])
    if loss.objective == "cispo":
        weight = ratio.detach().clamp(low, high)
        return -weight * advantage * log_prob, weight != ratio
    if loss.objective == "sapo":
        steep = loss.sapo_temperatures[advantage <= 0]
        return -advantage * (4 / steep) * torch.sigmoid(steep * (ratio - 1)), torch.zeros_like(chosen)
    if loss.objective == "reinforce":
        return -advantage * log_prob, torch.zeros_like(chosen)
    if loss.objective == "gspo":
        ratio = (log_prob - old)[chosen].mean().exp().expand(len(chosen)) if chosen.any() else torch.ones_like(log_prob)
    free, bound = -ratio * advantage, -ratio.clamp(low, high) * advantage
    value = torch.maximum(free, bound)
    if loss.dual_clip is not None and advantage < 0:
        value = value.clamp(max=-advantage * loss.dual_clip)
    return value, bound > free


def _covariant(loss: Loss, members: list[Response], entropies: Masks, old: dict[tuple[int, int], Any]) -> Masks:
    """Of a mini-batch, all tokens in Clip-Cov's band, or KL-Cov's share; nothing without either."""
    log_probs = {name: log_prob for name, (_, log_prob, _) in old.items()}
    if loss.kl_cov is not None:
        forks = Forks.model_validate({"select": "covariance", "top_entropy_quantile": loss.kl_cov[0]})
        return by_rule(forks, members, entropies, log_probs)
    if loss.clip_cov is None:
        return {}
    assert loss.clip_cov[0] == 1.0, "which are drawn is not known here"
    flat = torch.cat([log_probs[_name(r)] for r in members])
    advantages = torch.cat([torch.full((len(r.tokens),), r.advantage, dtype=torch.float64) for r in members])
    scores = (flat - flat.mean()) * (advantages - advantages.mean())
    within = (scores >= loss.clip_cov[1]) & (scores <= loss.clip_cov[2])
    return {_name(r): part for r, part in zip(members, within.split([len(r.tokens) for r in members]), strict=True)}


def correction(loss: Loss, log_ratios: list[float]) -> torch.Tensor:
    """The factor of each token's loss of a response, from the log of p_old / p_rollout of each: fp64."""
    spec, n = loss.mismatch, len(log_ratios)
    product, ratios = math.exp(sum(log_ratios)), [math.exp(x) for x in log_ratios]
    of_level = {"token": ratios, "sequence": [product] * n, "geometric": [product ** (1 / n)] * n}
    cap = loss.importance_cap
    factors = [1.0 if cap is None else min(ratio, cap) for ratio in of_level[loss.importance_level]]
    bands = {"token": spec.token_mask, "sequence": spec.sequence_mask, "geometric": spec.geometric_mask}
    for level, band in bands.items():
        if band is not None:
            factors = [f * (band[0] <= ratio <= band[1]) for f, ratio in zip(factors, of_level[level], strict=True)]
    if spec.veto is not None and min(ratios) < spec.veto:
        factors = [0.0] * n
    return torch.tensor(factors, dtype=torch.float64)


def _name(r: Response) -> tuple[int, int]:
    return r.group, r.sample


def _micro_batches(members: list[Response], spec: Recipe, dp: int) -> list[list[Response]]:
    """Of all DP ranks; empty ones hold nothing to average over."""
    layout = spec.parallel
    ranks = plan([r.length for r in members], dp, spec.micro_batch_tokens, layout.sequence_multiple, layout.micro_batch_multiple)
    return [[members[n] for n in micro] for rank in ranks for micro in rank if micro]


def _tau(entropies: list[torch.Tensor], spec: Recipe) -> torch.Tensor:
    values = torch.cat(entropies)
    k = math.ceil(len(values) * round(spec.forks.top_entropy_quantile * 1000) / 1000)
    return values.sort(descending=True).values[k - 1]


def by_rule(forks: Forks, members: list[Response], entropies: Masks, log_probs: Masks) -> Masks:
    """What a rule other than `top` selects among responses that share a threshold, from its formula in float64."""
    lengths = [len(r.tokens) for r in members]
    entropy, log_prob = (torch.cat([values[_name(r)] for r in members]).double() for values in (entropies, log_probs))
    advantage = torch.cat([torch.full((n,), r.advantage, dtype=torch.float64) for n, r in zip(lengths, members, strict=True)])
    p = log_prob.exp()
    match forks.select:
        case "prefix" | "all":
            chosen = torch.ones_like(p, dtype=torch.bool)
        case "rsi":
            low, high = forks.rsi_interval or (0, 0)
            chosen = torch.tensor([low <= -x / h <= high for x, h in zip(log_prob.tolist(), entropy.tolist(), strict=True)])
        case "stapo":
            rare_below, share = forks.stapo or (0.002, 0.75)
            rare = [n for n in range(len(p)) if advantage[n] > 0 and p[n] < rare_below]
            ordered = sorted(float(entropy[n]) for n in rare)
            bar = ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0.0
            chosen = torch.tensor([not (n in rare and entropy[n] < bar) for n in range(len(p))])
        case select:
            score = {
                "bottom": -entropy,
                "gmts": (advantage * entropy).abs(),
                "gradient": 2 * advantage.abs() * (1 - p),
                "covariance": (log_prob - log_prob.mean()) * (advantage - advantage.mean()),
            }[select]
            k = math.ceil(len(score) * round(forks.top_entropy_quantile * 1000) / 1000)
            chosen = score >= score.sort(descending=True).values[k - 1]
    return {_name(r): part for r, part in zip(members, chosen.split(lengths), strict=True)}


def _weights(micros: list[list[Response]], chosen: Masks, spec: Recipe) -> Masks:
    """What each token's loss counts."""
    forks = spec.forks
    emphases = {n: torch.where(mask, 1.0, forks.rest_weight) for n, mask in chosen.items()}
    if forks.horvitz_thompson:
        emphases = {_name(r): 1 / _kept_with_probability(r, forks.top_entropy_quantile) for micro in micros for r in micro}
    sums = {_name(r): float(emphases[_name(r)].sum()) for micro in micros for r in micro}
    if forks.normalize_by == "response":
        sums = {_name(r): float(r.whole_length) for micro in micros for r in micro}
    sequences = sum(map(len, micros))
    weights = {}
    for micro in micros:
        for r in micro:
            match spec.loss.reduction:
                case "token-mean":
                    denominator = sum(sums.values())
                case "official":
                    denominator = sum(sums[_name(other)] for other in micro) * sequences / len(micro)
                case "seq-mean":
                    denominator = (sums[_name(r)] or 1.0) * sequences
            weights[_name(r)] = emphases[_name(r)].double() / denominator
    return weights


def _kept_with_probability(r: Response, share: float) -> torch.Tensor:
    """Of each token before the cut of `select: prefix`: that ceil(n U^a) exceeds its place."""
    return torch.tensor([1 - (t / r.whole_length) ** (share / (1 - share)) for t in range(len(r.tokens))], dtype=torch.float64)


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
    model.routing = r.routing
    logits = model(ids[None]).logits[0, len(r.prompt_tokens) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, r.tokens.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def _imbalance(model: Any, every: list[Response]) -> torch.Tensor:
    """E sum_e f_e P_e of each response, from the logits of transformers' routers: averaged over responses, summed over layers."""
    total = torch.zeros((), dtype=torch.float64)
    for r in every:
        ids = torch.cat([r.prompt_tokens, r.tokens]).long()[:-1]  # the last token is never fed
        for logits in model(ids[None], output_router_logits=True).router_logits:
            chosen = logits.topk(model.config.num_experts_per_tok, -1).indices
            shares = torch.bincount(chosen.flatten(), minlength=logits.size(1)) / chosen.numel()
            total = total + logits.size(1) * (shares * logits.softmax(-1).mean(0)).sum()
    return total / len(every)
