"""The Megatron model against Hugging Face's, for every architecture and tensor-parallel layout, and its weights there and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import MODELS, recipe, save_model

from megafork.model.build import PolicyConfig, build_policy
from megafork.model.schedule import run_micro_batches
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.shape import FAMILIES, read_shape
from megafork.weights.huggingface import HuggingFaceWeights, write_folder
from megafork.weights.mapping import parameters, shards_of
from megafork.weights.policy_weights import export_policy, load_policy, local_parameters

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tp": 2},
    "TP2 SP": {"tp": 2, "sp": True},
    "TP4 SP": {"tp": 4, "sp": True},
    "PP2": {"pp": 2},
}
LENGTHS = [7, 12, 1, 12]


@dataclass
class Micro:
    """Whole sequences, each padded, of which the head answers at every position."""

    tokens: torch.Tensor
    lengths: tuple[int, ...]
    places: torch.Tensor
    positions: torch.Tensor
    positions_on_host: torch.Tensor
    targets: torch.Tensor
    temperature: torch.Tensor
    selected: torch.Tensor
    selected_on_host: torch.Tensor
    owner: torch.Tensor
    order: torch.Tensor | None = None
    balance: float = 0.0
    routing: torch.Tensor | None = None
    entropy_temperature: float = 0.7


def _reference(folder: Path, tokens: list[torch.Tensor], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each next token and entropy at each position by transformers, in float64 from the logits on."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    log_probs, entropies = [], []
    with torch.no_grad():
        for ids in tokens:
            logits = model(ids[None]).logits[0].double() / temperature
            logp = logits.log_softmax(-1)
            log_probs.append(logp.gather(-1, ids.roll(-1)[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


def _score_on_rank(spec: Recipe, tokens: list[torch.Tensor], out: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    shape = read_shape(Path(spec.model.path))
    source = HuggingFaceWeights(Path(spec.model.path))
    source.check(shape)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, source, shape, mesh)
    multiple = 4
    padded = [torch.nn.functional.pad(ids, (0, -len(ids) % multiple)) for ids in tokens]
    positions, start = [], 0
    for ids, wide in zip(tokens, padded, strict=True):
        positions.append(torch.arange(start, start + len(ids)))
        start += len(wide)
    count = sum(map(len, positions))
    micro = Micro(
        tokens=torch.cat(padded)[None],
        lengths=tuple(map(len, padded)),
        places=torch.cat([torch.arange(len(wide)) for wide in padded]),
        owner=torch.cat([torch.full((len(wide),), n) for n, wide in enumerate(padded)]),
        positions=torch.cat(positions),
        positions_on_host=torch.cat(positions),
        targets=torch.cat([ids.roll(-1) for ids in tokens]),
        temperature=torch.full((count,), 0.7),
        selected=torch.arange(count),
        selected_on_host=torch.arange(count),
    )
    exported = dict(export_policy(chunks, shape, mesh))
    if mesh.is_rank_zero:
        write_folder(out, exported.items(), like=Path(spec.model.path))
    if spec.parallel.pp == 1:
        held = [p.name for p in parameters(shape) if shards_of(p, shape, spec.parallel).of(mesh.rank) is not None]
        assert list(local_parameters(chunks)) == held, "the table has Megatron's order"
    answers: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        run_micro_batches(
            chunks, [micro], lambda micro, answer, non_loss_data: answers.append(answer), cp=1, forward_only=True, everywhere=False
        )
    return answers[0] if mesh.is_last_stage else None


EXPERTS: dict[str, dict[str, Any]] = {"TP1": {}, "TP2 SP EP2": {"tp": 2, "sp": True, "ep": 2}, "PP2": {"pp": 2}}
"""For mixtures of experts; `test_experts.py` has more."""


def cases() -> list[tuple[str, str]]:
    return [(model, layout) for model, (architecture, _) in MODELS.items() for layout in (EXPERTS if "Moe" in architecture else LAYOUTS)]


@pytest.mark.parametrize(("model", "layout"), cases())
def test_equals_hugging_face_and_exports_bit_equal(model: str, layout: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[model]
    folder = save_model(tmp_path / "in", architecture, **changes)
    spec = recipe(folder, parallel={**LAYOUTS, **EXPERTS}[layout])
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 99, (n,), generator=generator) for n in LENGTHS]
    results = on_ranks(spec.parallel.model_size, _score_on_rank, spec, tokens, tmp_path / "out")

    before, after = HuggingFaceWeights(folder), HuggingFaceWeights(tmp_path / "out")
    assert before.names() == after.names()
    for name in before.names():
        rows = (0, before.shape(name)[0])
        assert torch.equal(before.read(name, rows), after.read(name, rows)), name

    log_prob, entropy = _reference(tmp_path / "out", tokens, 0.7)
    answers = [result for result in results if result is not None]
    assert len(answers) == spec.parallel.tp
    for result in answers:
        torch.testing.assert_close(result[0].double(), log_prob, atol=1e-5, rtol=0)
        torch.testing.assert_close(result[1].double(), entropy, atol=1e-5, rtol=0)


def test_every_family_of_the_table_is_tested() -> None:
    assert {f"{architecture}ForCausalLM" for architecture, _ in MODELS.values()} == set(FAMILIES)
