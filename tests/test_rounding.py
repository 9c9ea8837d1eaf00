"""How the layout affects the mask: not through the selection, and in bf16 only through the entropies that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import TINY, recipe
from torch import Tensor

from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.rl.batch import Response
from megafork.rl.forks import NEAR, ForkGroups, Selection, select_forks
from megafork.rl.packing import packer, placement
from megafork.shape import read_shape
from megafork.train.learner import Learner
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tp": 2}),
    "CP2": (2, {"cp": 2}),
    "DP2": (2, {}),
    "PP2": (2, {"pp": 2}),
}
VOCABULARY, SEQUENCES, LENGTH = 99, 96, 129


def text(count: int, seed: int) -> Tensor:
    """Sequences [count, LENGTH] of a language with forks: three quarters of the words have one successor, the others two to eight."""
    language = torch.Generator().manual_seed(1)
    successors = torch.full((VOCABULARY, VOCABULARY), -torch.inf)
    for word in range(VOCABULARY):
        choices = 1 if torch.rand((), generator=language) < 0.75 else int(torch.randint(2, 9, (), generator=language))
        successors[word, torch.randperm(VOCABULARY, generator=language)[:choices]] = torch.randn(choices, generator=language)
    probabilities, chance = successors.softmax(-1), torch.Generator().manual_seed(seed)
    words = [torch.randint(0, VOCABULARY, (count,), generator=chance)]
    for _ in range(LENGTH - 1):
        words.append(torch.multinomial(probabilities[words[-1]], 1, generator=chance)[:, 0])
    return torch.stack(words, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt the language: most of its tokens are certain, as those of a trained model are."""
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**TINY, "vocab_size": VOCABULARY, "num_hidden_layers": 8}))
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        words = text(16, seed=step)[:, :65]
        loss = model(words, labels=words).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    folder = tmp_path_factory.mktemp("trained")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


Masks = dict[tuple[int, int], tuple[float, bool]]
"""(entropy, fork) by (sequence, offset)."""


def score_and_select(spec: Recipe) -> tuple[Masks, Selection | None]:
    """The tokens of this rank; the last stage's alone."""
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    shape, folder = read_shape(Path(spec.model.path)), Path(spec.model.path)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    words = text(SEQUENCES, seed=1_000).int()
    rows = [Response(n, 0, n, row[:1], row[1:], torch.zeros(LENGTH - 1), False) for n, row in enumerate(words)]
    pack = packer(mesh, whole=1, temperature=1.0)
    placed = placement([row.length for row in rows], spec.micro_batch_tokens, mesh)[mesh.dp_rank]
    micros = [pack([rows[n] for n in members]) for members in placed]
    Learner(chunks, spec, mesh, updates=1).score(micros)
    if not mesh.is_last_stage:
        return {}, None
    selection = select_forks(micros, spec.forks, ForkGroups(mesh.token_group, mesh.cp_group), seed=1, step=1)
    columns = [(m.sequence.tolist(), m.offset.tolist(), m.entropy.tolist(), m.mask.tolist(), m.responses) for m in micros]
    return {(held[s].group, o): (e, m) for *values, held in columns for s, o, e, m in zip(*values, strict=True)}, selection


def score_by_each(specs: list[Recipe]) -> list[tuple[Masks, Selection | None]]:
    return [score_and_select(spec) for spec in specs]


def in_layout(name: str, folder: Path) -> list[tuple[Masks, Selection]]:
    """All tokens, in fp32 and in bf16."""
    world, layout = LAYOUTS[name]
    sizes: dict[str, Any] = {"train": {"micro_batch_tokens": 1024}, "rollout": {"max_response_length": 512}}
    specs = [recipe(folder, parallel=layout, precision={"dtype": dtype}, **sizes) for dtype in ("fp32", "bf16")]
    found = []
    for of_dtype in zip(*on_ranks(world, score_by_each, specs), strict=True):
        tokens = {name: token for part, _ in of_dtype for name, token in part.items()}
        assert len(tokens) == SEQUENCES * (LENGTH - 1)
        selections = {selection for _, selection in of_dtype if selection is not None}
        assert len(selections) == 1, "every rank knows the same threshold"
        found.append((tokens, selections.pop()))
    return found


@pytest.mark.slow
def test_which_layouts_change_the_mask_in_which_precision(trained: Path) -> None:
    alone = in_layout("TP1", trained)
    for masks, selection in alone:
        assert selection.selected == -(-len(masks) // 5) and selection.near < 0.05 * len(masks)
        assert sum(entropy < 0.3 for entropy, _ in masks.values()) > 0.5 * len(masks), "a trained model is certain of many tokens"
    for name in LAYOUTS:
        for dtype, (masks, _), (plain, selection) in zip(("fp32", "bf16"), in_layout(name, trained), alone, strict=True):
            flipped = [token for token in plain if masks[token][1] != plain[token][1]]
            if dtype == "fp32" or name in ("DP2", "PP2"):
                assert flipped == [], (name, dtype)
            assert len(flipped) <= 0.1 * selection.near, (name, dtype)  # near tau by chance, they lie on either side by rounding
            assert all(abs(plain[token][0] - selection.tau) <= NEAR * selection.tau for token in flipped), (name, dtype)
            if name == "TP2":
                assert masks != plain, "tensor parallelism rounds entropies differently"
