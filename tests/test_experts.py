"""Mixtures of experts: whole steps in every layout against float64 transformers, bugs that are planted, and layouts that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from reference import reference
from safetensors.torch import load_file
from speed import by_speed
from tiny import MODELS, recipe, save_model
from training import Results, Rig, compare, specs, train_on_rank

from megafork.convert.convert import megatron_to_hf
from megafork.recipe import Parallel, Recipe, RecipeError
from megafork.shape import check_layout, check_rollout_tp, check_world, read_shape
from megafork.train.inputs import read_inputs
from megafork.weights.checkpoint import Checkpoints

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2 overlap": (2, {"parallel": {"ep": 2}, "optimizer": {"overlap": True}}),
    "EP2 TP2": (2, {"parallel": {"ep": 2, "tp": 2, "sp": True}}),
    "EP2 PP2": (4, {"parallel": {"ep": 2, "pp": 2}}),
    "EP2 CP2": (2, {"parallel": {"ep": 2, "cp": 2}}),
    "EP4": (4, {"parallel": {"ep": 4}}),
    "EP2 ETP2 TP2": (4, {"parallel": {"ep": 2, "etp": 2, "tp": 2, "sp": True}}),
    "TP2 recompute all": (2, {"parallel": {"tp": 2, "sp": True}, "model": {"recompute": "full"}}),
}
BALANCED = {"loss": {"expert_balance": 0.3}}
Case = tuple[Path, Results, Results]
"""A model's folder, what the reference makes of it, and what one rank does."""


def save(folder: Path, model: str, **changes: Any) -> Path:
    architecture, own = MODELS[model]
    return save_model(folder, architecture, **{**own, **changes})


def specs_of(folder: Path, sections: dict[str, Any]) -> list[Recipe]:
    """The balancing loss is on: it sees whole sequences, whichever ranks hold their tokens."""
    return specs(folder, {**sections, **BALANCED})


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = save(tmp_path_factory.mktemp("model"), "MoE", num_hidden_layers=2)
    [plain] = on_ranks(1, train_on_rank, specs_of(folder, {}))
    return folder, [reference(spec) for spec in specs_of(folder, {})], plain


@pytest.mark.parametrize("layout", by_speed(LAYOUTS, ("EP2 overlap", "EP2 TP2")))
def test_whole_steps_equal_the_float64_reference(layout: str, wanted: Case) -> None:
    folder, expected, plain = wanted
    world, sections = LAYOUTS[layout]
    compare(on_ranks(world, train_on_rank, specs_of(folder, sections)), expected, plain)


def test_a_stage_without_experts_takes_part(tmp_path: Path) -> None:
    """Only the second of four layers has experts, whose weights are not normalised; the router's gradient is the objective's alone."""
    folder = save(tmp_path, "MoE, some layers dense")
    assert read_shape(folder).mixture.layers == (1,)
    spec = specs(folder, {"parallel": {"ep": 2, "pp": 2}})[:1]
    compare(on_ranks(4, train_on_rank, spec), [reference(spec[0])])


def _gradients_of_all_ranks() -> None:
    """The gradients of experts are summed over all data-parallel ranks, which hold other experts."""
    from megafork.train import learner

    make = learner._data_parallel

    def planted(chunks: list[Any], **how: Any) -> Any:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.allreduce = True
        return make(chunks, **how)

    learner._data_parallel = planted


def _norm_of_one_kind() -> None:
    """The gradient norm is that of the parameters outside the experts."""
    from megatron.core.optimizer import ChainedOptimizer

    ChainedOptimizer.get_grad_norm = lambda self: self.chained_optimizers[0].get_grad_norm()


def _tokens_in_order_of_arrival() -> None:
    """The tokens that arrive are not sorted by expert."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    make = MoEAlltoAllTokenDispatcher.__init__

    def planted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.sort_input_by_local_experts = torch.arange(len(self.sort_input_by_local_experts))
        self.restore_output_by_local_experts = self.sort_input_by_local_experts

    MoEAlltoAllTokenDispatcher.__init__ = planted


def _experts_counted_on_each_rank() -> None:
    """Each rank takes its experts for the first ones."""
    from megafork.weights import mapping, policy_weights

    right = mapping.pieces

    def planted(parameter: mapping.Parameter, *where: Any) -> Any:
        if parameter.expert is not None:
            parameter = mapping.Parameter(parameter.family, parameter.rule, parameter.layer, parameter.expert % 2)
        return right(parameter, *where)

    policy_weights.pieces = planted  # type: ignore[assignment]


def _balance_of_own_tokens() -> None:
    """Each rank balances the tokens that it holds, not the sequence."""
    from megafork.model import experts

    experts.dist = type("Planted", (), {"all_reduce": staticmethod(lambda *args, **kwargs: None)})  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("layout", "plant"),
    [
        ("EP2 overlap", _gradients_of_all_ranks),
        ("EP2 overlap", _norm_of_one_kind),
        ("EP2 overlap", _tokens_in_order_of_arrival),
        ("EP2 overlap", _experts_counted_on_each_rank),
        ("EP2 CP2", _balance_of_own_tokens),
    ],
    ids=["expert gradients' group", "gradient norm", "dispatcher's order", "mapping of experts", "balance"],
)
def test_a_planted_bug_is_found(layout: str, plant: Callable[[], None], wanted: Case) -> None:
    folder, expected, _ = wanted
    world, sections = LAYOUTS[layout]
    results = on_ranks(world, train_on_rank, specs_of(folder, sections)[:1], plant)
    with pytest.raises(AssertionError):
        compare(results, expected[:1])


def test_router_metrics_are_those_of_the_tokens(wanted: Case) -> None:
    """They do not depend on the layout (`compare` checks that); here on what one rank saw."""
    _, _, plain = wanted
    for step in plain[0]["history"]:
        assert 0 <= step["experts/share_min"] < 0.25 < step["experts/share_max"] <= 0.5, "two of four experts for each token"
        assert 0 < step["experts/entropy"] < torch.log(torch.tensor(4.0))
        assert step["experts/dead"] == 0
        assert step["experts/balance_loss"] > 2 * 2 * BALANCED["loss"]["expert_balance"], "two mini-batches, two layers, at least 1 in each"


# ---- checkpoints


def _save_and_go_on(spec: Recipe, folder: Path) -> Any:
    rig = Rig(spec)
    rig.step(0)
    saved = rig.weights()
    run = {"recipe": spec.model_dump(mode="json")}
    Checkpoints(folder, rig.mesh, keep_last=1).save(1, rig.learner.chunks, rig.learner.optimizer, run)
    return [rig.step(number)[0] for number in (1, 2)], rig.weights(), saved


def _load_and_go_on(spec: Recipe, folder: Path) -> Any:
    rig = Rig(spec)
    Checkpoints(folder, rig.mesh, keep_last=1).load(1, rig.learner.chunks, rig.learner.optimizer)
    return [rig.step(number)[0] for number in (1, 2)], rig.weights()


CONTINUED: dict[str, tuple[tuple[int, dict[str, Any]], list[tuple[int, dict[str, Any]]]]] = {
    "MoE": ((2, {"ep": 2}), [(1, {}), (2, {"ep": 2, "tp": 2, "sp": True}), (4, {"ep": 2, "pp": 2})]),
    "MoE, some layers dense": ((4, {"ep": 2, "pp": 2}), [(2, {"pp": 2})]),
}
"""Of each model the layout that saves and those that load; the second's last stage has no experts, and no optimizer for them."""


@pytest.mark.slow
@pytest.mark.parametrize("model", CONTINUED)
def test_a_checkpoint_continues_under_other_layouts_and_becomes_a_folder(model: str, tmp_path: Path) -> None:
    source, folder = save(tmp_path / "m", model), tmp_path / "checkpoints"
    (world, parallel), others = CONTINUED[model]
    history, weights, saved = on_ranks(world, _save_and_go_on, specs(source, {"parallel": parallel})[0], folder)[0]
    for world, parallel in others:
        for got, loaded in on_ranks(world, _load_and_go_on, specs(source, {"parallel": parallel})[0], folder):
            for step, expected in zip(got, history, strict=True):
                assert step == pytest.approx(expected, rel=1e-4, abs=1e-6), parallel
            assert all((loaded[key] - weights[key]).abs().max() < 2e-5 for key in weights), parallel
    megatron_to_hf(folder / "step_000001", tmp_path / "hf")
    written = load_file(tmp_path / "hf/model.safetensors")
    assert written.keys() == saved.keys() and all(torch.equal(tensor, saved[name]) for name, tensor in written.items())


# ---- refusals


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"ep": 3}, "parallel.ep is 3 but the model has 4 experts: choose an ep that divides them"),
        ({"tp": 2}, "parallel.tp is 2 without parallel.sp: Megatron's experts need each token on one TP rank only; set parallel.sp=true"),
        ({"ep": 2, "etp": 5}, "parallel.etp is 5 but the model's moe_intermediate_size is 48: choose one that divides it"),
    ],
)
def test_a_layout_that_does_not_fit_the_experts(parallel: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_layout(read_shape(save(tmp_path, "MoE")), Parallel(**parallel))
    assert str(caught.value) == message


def test_the_mlp_binds_only_where_there_is_one(tmp_path: Path) -> None:
    sparse = read_shape(save(tmp_path / "sparse", "MoE", intermediate_size=97))
    check_layout(sparse, Parallel(tp=2, sp=True))
    mixed = read_shape(save(tmp_path / "mixed", "MoE, some layers dense", intermediate_size=97))
    with pytest.raises(RecipeError, match="the model's intermediate_size is 97"):
        check_layout(mixed, Parallel(tp=2, sp=True))


def test_a_dense_model_has_no_experts_to_split(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.ep is 2 but the model is dense, it has no experts: set parallel\.ep=1"):
        check_layout(read_shape(save_model(tmp_path)), Parallel(ep=2))


def test_engines_that_do_not_divide_the_experts(tmp_path: Path) -> None:
    shape = read_shape(save(tmp_path, "MoE", moe_intermediate_size=33))
    with pytest.raises(RecipeError, match=r"rollout\.tp is 2 but the model's moe_intermediate_size is 33"):
        check_rollout_tp(shape, 2)


@pytest.mark.parametrize(
    ("layout", "ranks", "said"),
    [
        (Parallel(ep=4), 2, "parallel.ep x etp is 4 x 1 = 4, which does not divide the 2 ranks of a pipeline stage: start a multiple of 4"),
        (Parallel(ep=2, pp=2), 2, "does not divide the 1 ranks of a pipeline stage: start a multiple of 4 ranks (run.ranks)"),
        (Parallel(ep=2, etp=2, tp=2, sp=True), 6, "parallel.ep x etp is 2 x 2 = 4, which does not divide the 6 ranks"),
    ],
)
def test_ranks_that_do_not_hold_all_experts(layout: Parallel, ranks: int, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_world(layout, ranks)
    assert said in str(caught.value)
    check_world(layout, layout.smallest_world)


def test_etp_without_ep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel\.etp is 2 but parallel\.ep is 1"):
        recipe(tmp_path, parallel={"etp": 2})


def test_a_dense_model_has_no_experts_to_balance(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"loss\.expert_balance is 0\.1 but the model is dense, it has no experts: leave it out"):
        read_inputs(recipe(save_model(tmp_path), loss={"expert_balance": 0.1}), supervised=True)
