"""The central invariant: every layout gives the mask, the metrics and the weights of a plain float64 implementation on transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from reference import reference
from speed import by_speed
from tiny import recipe, save_model
from training import SHARES, Results, compare, specs, train_on_rank

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"parallel": {"tp": 2}}),
    "TP2 SP": (2, {"parallel": {"tp": 2, "sp": True}}),
    "TP4 SP, 2 KV heads": (4, {"parallel": {"tp": 4, "sp": True}}),
    "DP2": (2, {}),
    "DP2 overlap": (2, {"optimizer": {"overlap": True}}),
    "PP2": (2, {"parallel": {"pp": 2}}),
    "PP2 VPP2": (2, {"parallel": {"pp": 2, "vpp": 2}}),
    "PP2 VPP2 DP2 overlap": (4, {"parallel": {"pp": 2, "vpp": 2}, "optimizer": {"overlap": True}}),
    "PP2 uneven": (2, {"parallel": {"pp": 2, "first_stage_layers": 3}}),
    "PP4": (4, {"parallel": {"pp": 4}}),
    "CP2": (2, {"parallel": {"cp": 2}}),
    "CP2 TP2 SP": (4, {"parallel": {"cp": 2, "tp": 2, "sp": True}}),
    "DP2 PP2": (4, {"parallel": {"pp": 2}}),
    "TP2 PP2 CP2": (8, {"parallel": {"tp": 2, "pp": 2, "cp": 2}}),
    "TP2 recompute all": (2, {"parallel": {"tp": 2}, "model": {"recompute": "full"}}),
    "CP2 recompute attention": (2, {"parallel": {"cp": 2}, "model": {"recompute": "selective"}}),
}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, Results, Results]]:
    """A model, what the reference makes of it, and what one rank does, by whether its embedding is tied."""

    @cache
    def make(tied: bool) -> tuple[Path, Results, Results]:
        folder = save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=tied)
        [plain] = on_ranks(1, train_on_rank, specs(folder, {}))
        return folder, [reference(spec) for spec in specs(folder, {})], plain

    return make


QUICK = ("TP1", "TP2 SP", "DP2", "PP2 VPP2", "CP2")
"""One layout of each kind, for `make test-fast`."""
CROSSED = ("TP1", "TP2 SP", "PP2 VPP2")
"""Where both models meet both shares. The others train the tied one on the forks and the untied one on all tokens: what a tied embedding
adds, its gradient's sums over TP and between stages, does not depend on which tokens have a loss."""


@pytest.mark.parametrize("layout", by_speed(LAYOUTS, QUICK))
def test_whole_steps_equal_the_float64_reference(layout: str, wanted: Any) -> None:
    """The forward, the backward, the threshold and the optimizer under every split; the reference knows no ranks."""
    world, sections = LAYOUTS[layout]
    cases = [(tied, n) for tied in (True, False) for n in range(len(SHARES)) if layout in CROSSED or tied == (n == 0)]
    every = [specs(wanted(tied)[0], sections)[n] for tied, n in cases]
    expected, plain = ([wanted(tied)[part][n] for tied, n in cases] for part in (1, 2))
    assert any(step["loss/clip_fraction"] > 0 for result in plain for step in result["history"]), "the clip is part of what is tested"
    compare(on_ranks(world, train_on_rank, every), expected, plain)


SWITCHES: dict[str, dict[str, Any]] = {
    "as the paper words it": {"forks": {"entropy_from": "current"}},
    "one threshold a step": {"forks": {"scope": "batch"}},
    "as the authors' code": {
        "forks": {"scope": "microbatch", "entropy_from": "current"},
        "loss": {"dual_clip": 1.05, "reduction": "official"},
    },
    "a mean per response over all its tokens": {"forks": {"normalize_by": "response"}, "loss": {"reduction": "seq-mean"}},
    "GSPO": {"loss": {"objective": "gspo", "clip_low": 0.02, "clip_high": 0.03, "reduction": "seq-mean"}},
    "CISPO": {"loss": {"objective": "cispo", "clip_high": 0.1}},
    "SAPO": {"loss": {"objective": "sapo", "sapo_temperatures": [1.0, 1.5]}, "forks": {"top_entropy_quantile": 1.0}},
    "REINFORCE": {"loss": {"objective": "reinforce"}},
    "GMTS": {"forks": {"select": "gmts"}},
    "the gradient at the logits": {"forks": {"select": "gradient", "scope": "minibatch"}},
    "covariance": {"forks": {"select": "covariance", "top_entropy_quantile": 0.3}, "loss": {"reduction": "seq-mean"}},
    "RSI-S": {"forks": {"select": "rsi", "rsi_interval": [0.95, 1.05]}},
    "STAPO": {"forks": {"select": "stapo", "stapo": [0.01, 0.5]}},
    "a weight in place of a mask": {"forks": {"rest_weight": 0.25}, "loss": {"reduction": "official"}},
    "prefixes, unbiased": {
        "forks": {"select": "prefix", "top_entropy_quantile": 0.6, "horvitz_thompson": True, "normalize_by": "response"},
        "loss": {"reduction": "seq-mean"},
    },
    "IcePop": {"loss": {"importance_cap": 2.0, "mismatch": {"token_mask": [0.5, 2.0]}}},
    "sequence importance, geometric mask": {
        "loss": {"importance_cap": 3.0, "importance_level": "sequence", "mismatch": {"geometric_mask": [0.8, 1.25]}, "objective": "gspo"}
    },
    "geometric importance, sequence mask, veto": {
        "loss": {"importance_cap": 1.1, "importance_level": "geometric", "mismatch": {"sequence_mask": [0.01, 100.0], "veto": 0.2}}
    },
    "two clips and two penalties": {  # Archer's
        "forks": {"rest_weight": 1.0},
        "loss": {"clip_low": 0.3, "clip_high": 0.4, "clip_rest": [0.02, 0.03], "kl": {"coef": 0.02, "rest_coef": 0.2}},
    },
    "k1": {"loss": {"kl": {"coef": 0.1, "estimator": "k1"}}},
    "k2, entropy bonus": {"loss": {"kl": {"coef": 0.1, "estimator": "k2"}, "entropy_bonus": 0.05}},
    "Clip-Cov": {"forks": {"top_entropy_quantile": 1.0}, "loss": {"clip_cov": [1.0, 0.05, 5.0]}},
    "KL-Cov": {"forks": {"top_entropy_quantile": 1.0}, "loss": {"kl_cov": [0.1, 0.5]}},
    "all tokens in the denominator": {"forks": {"normalize_by": "response"}, "rollout": {"temperature": 1.5}},
}


STEPS = 1
"""Of two updates, by each switch: the second has weights that have moved, and moments of AdamW."""
LAYERS = {"PP2 VPP2": 4}
"""Of the model that meets every switch: no more than the layout needs, as a switch acts after the last one."""
BASE: dict[str, Any] = {"train": {"micro_batch_tokens": 64, "minibatches": 2}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], tuple[Path, Results, dict[str, Any]]]:
    """A model of so many layers, and what the reference makes of every switch and of none, by the number of DP ranks, which is that of the
    micro-batches' owners."""

    @cache
    def model(layers: int) -> Path:
        return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=layers)

    @cache
    def make(layers: int, switch: str | None, dp: int) -> dict[str, Any]:
        return reference(recipe(model(layers), **BASE, **(SWITCHES[switch] if switch else {})), dp=dp, steps=STEPS)

    def all_of(layers: int, dp: int) -> tuple[Path, Results, dict[str, Any]]:
        by_micro_batch = [s for s in SWITCHES if "official" in str(SWITCHES[s]) or "microbatch" in str(SWITCHES[s])]
        return model(layers), [make(layers, s, dp if s in by_micro_batch else 1) for s in SWITCHES], make(layers, None, 1)

    return all_of


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2 SP", "DP2", "PP2 VPP2", "CP2"])
def test_every_switch_equals_the_reference_in_every_layout(layout: str, switched: Any) -> None:
    """Selections, objectives and penalties read other ranks' tokens, entropies and log-probs: one layout of each kind, all switches in one
    fork."""
    folder, expected, plain = switched(LAYERS.get(layout, 2), 2 if layout == "DP2" else 1)
    world, sections = LAYOUTS[layout]
    every = [recipe(folder, **BASE, **switches, **sections) for switches in SWITCHES.values()]
    compare(on_ranks(world, train_on_rank, every, None, STEPS), expected)
    for name, result in zip(SWITCHES, expected, strict=True):
        assert result["history"][-1]["loss/policy"] != pytest.approx(plain["history"][-1]["loss/policy"]), f"{name!r} changes something"


def test_truncated_importance_sampling_equals_the_reference(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    pair = specs(folder, {"loss": {"importance_cap": 2.0}, "parallel": {"cp": 2}})
    results = on_ranks(2, train_on_rank, pair)
    compare(results, [reference(spec) for spec in pair])
    assert all(0.0 < step["loss/capped_fraction"] < 0.5 for result in results[0] for step in result["history"])


@pytest.mark.slow
def test_fork_aware_decoding_equals_the_reference(tmp_path: Path) -> None:
    """Each token's log-prob, old and new, is at the temperature that drew it; the forks are those of the entropies at temperature 1."""
    folder = save_model(tmp_path / "m")
    colder = specs(folder, {"rollout": {"fork_temperature": (0.7, 1.3, 4.3)}, "parallel": {"tp": 2, "cp": 2, "sp": True}})
    expected = [reference(spec) for spec in colder]
    compare(on_ranks(4, train_on_rank, colder), expected)
    warm = [reference(spec)["history"] for spec in specs(folder, {})]
    assert all(a["history"][-1]["loss/policy"] != pytest.approx(b[-1]["loss/policy"]) for a, b in zip(expected, warm, strict=True))


def test_rho_one_is_plain_dapo_to_the_last_bit(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    pair = [recipe(folder, parallel={"tp": 2}, forks=forks) for forks in ({"top_entropy_quantile": 1.0}, {"select": "all"})]
    forked, plain = on_ranks(2, train_on_rank, pair)[0]
    undefined = "forks/tau", "forks/ties", "forks/near_tau"
    numbers = [[{k: v for k, v in step.items() if k not in undefined} for step in run["history"]] for run in (forked, plain)]
    assert numbers[0] == numbers[1]
    assert forked["masks"] == plain["masks"]
    assert all(torch.equal(tensor, plain["weights"][name]) for name, tensor in forked["weights"].items())


def _neighbour_labels() -> None:
    """Labels by shifting each CP rank's own tokens: wrong at the edges of its chunks, where the next token is another rank's."""
    from megafork.rl.packing import packer

    def planted(mesh: Any, **how: Any) -> Any:
        pack = packer(mesh, **how)

        def shifted(responses: list[Any]) -> Any:
            micro = pack(responses)
            fed = micro.offset + 1 < torch.tensor([len(r.tokens) for r in micro.responses] or [0])[micro.sequence]
            micro.targets = torch.where(fed, micro.tokens[0].roll(-1)[micro.positions], micro.targets)
            return micro

        return shifted

    _replace("training", "packer", planted)


def _own_denominator() -> None:
    """Each rank divides by its own count of tokens."""
    from megafork.rl import loss

    loss.all_sum = lambda values, group: values


def _norms_not_summed() -> None:
    """The norms' gradients, of a share of the tokens on each sequence-parallel rank, are not summed over them."""
    from megafork.model import build, policy

    class Planted(policy.RMSNorm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    build.RMSNorm = Planted  # type: ignore[misc]


def _layers_in_a_row() -> None:
    """A stage's chunks hold consecutive layers, instead of going round the stages."""
    from megafork.parallel.mesh import mpu
    from megafork.weights import policy_weights

    load = policy_weights.load_policy

    def planted(chunks: list[Any], *args: Any) -> None:
        per_chunk = len(chunks[0].decoder.layers)
        right = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
        for n, chunk in enumerate(chunks):
            for m, layer in enumerate(chunk.decoder.layers):
                layer.layer_number = 1 + (mpu.get_pipeline_model_parallel_rank() * len(chunks) + n) * per_chunk + m
        load(chunks, *args)
        for chunk, numbers in zip(chunks, right, strict=True):
            for layer, number in zip(chunk.decoder.layers, numbers, strict=True):
                layer.layer_number = number

    policy_weights.load_policy = planted  # type: ignore[assignment]


def _replace(module: str, name: str, value: Any) -> None:
    import sys

    setattr(sys.modules[module], name, value)


@pytest.mark.parametrize(
    ("layout", "plant"),
    [
        ("CP2", _neighbour_labels),
        ("DP2", _own_denominator),
        ("TP2 SP", _norms_not_summed),
        ("PP2 VPP2", _layers_in_a_row),
    ],
    ids=["CP label shift", "loss denominator", "SP norm gradient", "VPP order"],
)
def test_a_planted_bug_is_found(layout: str, plant: Callable[[], None], wanted: Any) -> None:
    folder, expected, _ = wanted(False)
    world, sections = LAYOUTS[layout]
    results = on_ranks(world, train_on_rank, specs(folder, sections)[:1], plant)
    with pytest.raises(AssertionError):
        compare(results, expected[:1])
