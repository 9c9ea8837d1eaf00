"""The update's invariants: every layout gives the loss, gradients and weights of a plain float64 implementation on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import recipe, save_model

from megafork.model.qwen3 import build_policy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.forks import ForkGroups, select_forks
from megafork.rl.loss import set_weights, token_loss
from megafork.rl.packing import pack, plan
from megafork.shape import read_shape
from megafork.train.update import Learner
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import export_policy, load_policy

STEPS = 3


def responses(seed: int = 5, count: int = 12) -> list[Response]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        lengths = torch.randint(1, 17, (2,), generator=generator).tolist()
        prompt, answer = (torch.randint(0, 99, (length,), generator=generator, dtype=torch.int32) for length in lengths)
        advantage = float(torch.randn((), generator=generator))
        made.append(
            Response(n // 4, n % 4, n // 4, prompt, answer, -torch.rand(lengths[1], generator=generator), False, advantage=advantage)
        )
    return made


def _train_on_rank(spec: Recipe, budget: int) -> dict[str, Any]:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    folder = Path(spec.model.path)
    shape = read_shape(folder)
    chunks = build_policy(shape, spec, mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    learner = Learner(chunks, spec, mesh, updates=STEPS)
    groups = ForkGroups(mesh.token_group, mesh.cp_group)
    every = responses()
    multiple = 2 * mesh.layout.cp * mesh.layout.tp if mesh.layout.cp > 1 or mesh.layout.sp else 1
    placed = plan([r.length for r in every], mesh.dp, budget, multiple)[mesh.dp_rank]
    history, masks = [], {}
    for step in range(STEPS):
        micros = [pack([every[n] for n in members], cp=mesh.layout.cp, cp_rank=mesh.cp_rank, multiple=multiple) for members in placed]
        learner.score(micros)
        found = None
        if mesh.is_last_stage:
            found = select_forks(micros, spec.forks, groups, seed=1, step=step)
            set_weights(micros, spec.forks, spec.loss, groups)
            for micro in micros:
                masks.update(_by_token(micro, step))
        history.append((learner.train(micros, _loss(spec)), found))
    return {"history": history, "masks": masks, "weights": dict(export_policy(chunks, shape, mesh))}


def _loss(spec: Recipe):  # type: ignore[no-untyped-def]
    def loss(log_prob: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value, clipped = token_loss(log_prob, micro.old_log_prob[micro.mask], micro.advantage[micro.mask], spec.loss)
        return value, {"clipped": clipped.sum()}

    return loss


def _by_token(micro: MicroBatch, step: int) -> dict[tuple[int, int, int, int], bool]:
    names = [(micro.responses[s].group, micro.responses[s].sample, o) for s, o in zip(micro.sequence, micro.offset, strict=True)]
    return {(step, g, s, int(o)): bool(m) for (g, s, o), m in zip(names, micro.mask, strict=True)}


def reference(folder: Path, spec: Recipe) -> dict[str, Any]:
    """The same three steps in float64 on transformers with torch's AdamW, one response at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    o = spec.optimizer
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    every, history, masks = responses(), [], {}
    for step in range(STEPS):
        scored = [_score(model, r, spec.rollout.temperature) for r in every]
        entropies = torch.cat([entropy.detach() for _, entropy in scored])
        k = -(-len(entropies) * round(spec.forks.top_entropy_quantile * 1000) // 1000)
        tau = entropies.sort(descending=True).values[k - 1]
        total = sum(int((entropy >= tau).sum()) for _, entropy in scored)
        loss = torch.zeros((), dtype=torch.float64)
        for r, (log_prob, entropy) in zip(every, scored, strict=True):
            mask = entropy.detach() >= tau
            masks.update({(step, r.group, r.sample, n): bool(m) for n, m in enumerate(mask)})
            ratio = (log_prob - log_prob.detach()).exp()
            loss = loss - (torch.minimum(ratio * r.advantage, ratio.clamp(0.8, 1.28) * r.advantage) * mask).sum() / total
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        adam.step()
        history.append({"loss": loss.item(), "grad_norm": norm.item(), "tau": float(tau)})
    return {"history": history, "masks": masks, "weights": {n: p.detach() for n, p in model.state_dict().items()}}


def _score(model: Any, r: Response, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([r.prompt_tokens, r.tokens]).long()
    logits = model(ids[None]).logits[0, len(r.prompt_tokens) - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(-1, r.tokens.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tp": 2}),
    "TP2 SP": (2, {"tp": 2, "sp": True}),
    "DP2": (2, {}),
    "PP2": (2, {"pp": 2}),
    "CP2": (2, {"cp": 2}),
}


@pytest.mark.parametrize("rho", [0.2, 1.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_updates_equal_the_float64_reference(layout: str, tied: bool, rho: float, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tie_word_embeddings=tied)
    world, parallel = LAYOUTS[layout]
    spec = recipe(folder, parallel=parallel, forks={"top_entropy_quantile": rho})
    wanted = reference(folder, spec)
    results = on_ranks(world, _train_on_rank, spec, 64)
    masks: dict[Any, bool] = {}
    for result in results:
        masks.update(result["masks"])
    assert masks == wanted["masks"]
    for result in results:
        for (got, found), want in zip(result["history"], wanted["history"], strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-4, abs=1e-6)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
            if found is not None:
                assert found.tau == pytest.approx(want["tau"], rel=1e-5)
        for name, tensor in result["weights"].items():
            assert (tensor.double() - wanted["weights"][name]).abs().max() < 2e-5, name


def test_rho_one_is_plain_dapo_to_the_last_bit(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    specs = [recipe(folder, parallel={"tp": 2}, forks=forks) for forks in ({"top_entropy_quantile": 1.0}, {"select": "all"})]
    forked, plain = (on_ranks(2, _train_on_rank, spec, 64)[0] for spec in specs)
    assert [got for got, _ in forked["history"]] == [got for got, _ in plain["history"]]
    assert forked["masks"] == plain["masks"]
    assert all(torch.equal(tensor, plain["weights"][name]) for name, tensor in forked["weights"].items())
