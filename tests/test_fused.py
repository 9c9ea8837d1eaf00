"""Fused layers: chosen where they can run and refused elsewhere, and in their structure the same model as plain layers.

Their kernels need a GPU (`tools/gpu`). Transformer Engine's modules can be built on the CPU, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import training
from fused import KINDS, check_same_model, layer_names, load, model_of, needs_te, save, train_fused
from ranks import on_ranks
from reference import reference
from task import make_task, write_recipe
from tiny import save_model

from megafork import doctor
from megafork.commands import preflight
from megafork.gpus import fused_problem
from megafork.model.attention import PackedSequences
from megafork.model.build import PolicyConfig, build_policy
from megafork.model.kernels import choose
from megafork.model.rope import FusedRotary, PackedRotary
from megafork.parallel.context import places_of, unzigzag_index, zigzag_index
from megafork.parallel.mesh import build_mesh
from megafork.plan.models import KNOWN
from megafork.recipe import Parallel, Precision, Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.shape import check_layout, read_shape

BF16 = Precision(dtype="bf16")

# ---- the choice


@pytest.mark.skipif(fused_problem() is None, reason="this machine can run fused layers")
def test_a_machine_that_cannot_run_them_refuses_fused_and_takes_plain(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    asked, left = (load_recipe(write_recipe(task), [f"model.kernels={value}", "precision.dtype=bf16"]) for value in ("fused", "auto"))
    for command in ("train", "sft"):
        with pytest.raises(RecipeError, match=REFUSED):
            preflight(command, asked, 1)
    on_ranks(1, _refused_by_a_rank, asked)
    findings = {spec.model.kernels: doctor._for_recipe(spec) for spec in (asked, left)}
    assert not doctor.can_run(findings["fused"])
    [finding] = [finding for finding in findings["auto"] if finding.name == "model.kernels"]
    assert finding.found == f"plain, because {fused_problem()}" and not finding.needed


REFUSED = r"^model\.kernels is fused but (there is no GPU|Transformer Engine is not installed).*: set kernels=auto"


def _refused_by_a_rank(spec: Recipe) -> None:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match=REFUSED):
        build_policy(read_shape(Path(spec.model.path)), PolicyConfig.of(spec), mesh)


def test_where_they_can_run_auto_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformer_engine").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kernels in ("auto", "fused"):
        assert choose(kernels, BF16, Parallel()).fused
    assert not choose("plain", BF16, Parallel()).fused
    assert str(choose("auto", Precision(dtype="fp32"), Parallel())) == "plain, because precision.dtype is fp32"
    with pytest.raises(RecipeError, match=r"^parallel\.cp_comm is all_gather with fused layers: .*set cp_comm=p2p or"):
        choose("auto", BF16, Parallel(cp=2, cp_comm="all_gather"))


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    file = write_recipe(make_task(tmp_path))
    wrong = {
        r"^model\.kernels is fused with precision\.dtype=fp32: .*set dtype=bf16, or": ["model.kernels=fused", "precision.dtype=fp32"],
        r"^parallel\.cp_comm is p2p but parallel\.cp is 1: leave it out": ["parallel.cp_comm=p2p"],
        r"^parallel\.cp_comm is a2a with plain layers: .*leave it out, or": [
            "model.kernels=plain",
            "parallel.cp=2",
            "parallel.cp_comm=a2a",
        ],
        r"^parallel\.cp_comm is all_gather with fused layers": [
            "model.kernels=fused",
            "precision.dtype=bf16",
            "parallel.cp=2",
            "parallel.cp_comm=all_gather",
        ],
    }
    for message, changes in wrong.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(file, changes)
    with pytest.raises(RecipeError, match=r"^parallel\.cp_comm is p2p with plain layers"):
        choose("plain", BF16, Parallel(cp=2, cp_comm="p2p"))
    shape = KNOWN["qwen3-32b"]  # 8 key-value heads
    for tp, cp in ((1, 8), (2, 4), (4, 2)):
        check_layout(shape, Parallel(tp=tp, cp=cp, cp_comm="a2a"))
    for tp, cp in ((8, 2), (4, 4), (16, 2)):
        with pytest.raises(RecipeError, match=rf"^parallel\.cp_comm is a2a but at parallel\.tp={tp} a rank has [12] key-value heads"):
            check_layout(shape, Parallel(tp=tp, cp=cp, cp_comm="a2a"))


# ---- packed sequences

LENGTHS = [8, 24, 4, 8]


def packing_of(cp: int, rank: int) -> PackedSequences:
    places = places_of(LENGTHS, zigzag_index(LENGTHS, cp, rank))
    return PackedSequences.packed(LENGTHS, places, unzigzag_index(LENGTHS, cp) if cp > 1 else None)


def test_transformer_engine_is_told_the_lengths_that_the_host_knows() -> None:
    plain = packing_of(2, 1)
    found = plain.for_fused_layers()
    assert plain.cu_seqlens_q is None, "Megatron would wait for it in each layer"
    assert found.cu_seqlens_q.dtype == torch.int32 and found.cu_seqlens_q.tolist() == [0, 8, 32, 36, 44]
    assert (found.qkv_format, found.max_seqlen_q, found.max_seqlen_kv) == ("thd", 24, 24), "otherwise it reads them from the device"
    others = (found.cu_seqlens_kv, found.cu_seqlens_q_padded, found.cu_seqlens_kv_padded)
    assert all(other is found.cu_seqlens_q for other in others), "it compares them on the device, unless they are one tensor"


def test_the_table_of_angles_has_those_of_each_token() -> None:
    frequencies = torch.rand(16)
    for cp, rank in ((1, 0), (2, 0), (2, 1)):
        packing = packing_of(cp, rank)
        table = FusedRotary(frequencies)(packing.for_fused_layers())
        assert table.shape == (24, 1, 1, 32) and table.dtype == torch.float32
        assert torch.equal(table[packing.places, 0], PackedRotary(frequencies)(packing))


def _transformer_engine_s_share() -> None:
    from transformer_engine.pytorch.attention.dot_product_attention.context_parallel import get_batch_on_this_cp_rank
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    rank, cp = dist.get_rank(), dist.get_world_size()
    packing = packing_of(cp, rank).for_fused_layers()
    tokens = torch.arange(sum(LENGTHS))
    share = get_batch_on_this_cp_rank(packing.cu_seqlens_q, tokens[None], tokens[None], tokens, dist.group.WORLD)[0][0]
    assert torch.equal(share, zigzag_index(LENGTHS, cp, rank))
    frequencies, heads = torch.rand(16), torch.randn(len(share), 3, 32)
    rotated = apply_rotary_pos_emb(
        heads,
        FusedRotary(frequencies)(packing),
        tensor_format="thd",
        cu_seqlens=packing.cu_seqlens_q,
        cp_size=cp,
        cp_rank=rank,
    )
    angles = PackedRotary(frequencies)(packing)
    halves = torch.cat((-heads[..., 16:], heads[..., :16]), -1)
    torch.testing.assert_close(rotated, heads * angles.cos() + halves * angles.sin(), atol=1e-6, rtol=0)


@needs_te
def test_its_context_parallel_ranks_hold_the_tokens_that_ours_hold() -> None:
    on_ranks(2, _transformer_engine_s_share)


# ---- the model

LAYOUTS: dict[str, dict[str, Any]] = {"TP1": {}, "TP2": {"tp": 2}, "TP2 SP": {"tp": 2, "sp": True}, "PP2": {"pp": 2}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "Qwen2.5": ("Qwen2", {}),
    "Phi-4": ("Phi3", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
}
OWN_NAMES = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
"""Of a layer of Qwen3, in Transformer Engine."""


def _same_models(folders: list[Path], layout: dict[str, Any]) -> None:
    for folder in folders:
        check_same_model(folder, layout)


@needs_te
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_plain_model_in_names_shapes_marks_and_files(layout: str, tmp_path: Path) -> None:
    folders = [save_model(tmp_path / name, kind, dtype=torch.bfloat16, **changes) for name, (kind, changes) in MODELS.items()]
    on_ranks(2 if LAYOUTS[layout] else 1, _same_models, folders, LAYOUTS[layout])


def _attention(folder: Path) -> None:
    for comm in ("p2p", "a2a"):
        chunks, *_ = model_of("fused", folder, {"cp": 2, "cp_comm": comm})
        core = chunks[0].decoder.layers[0].self_attention.core_attention
        assert (core.cp_comm_type, core.cp_group.size(), core.fused_attention.softmax_scale) == (comm, 2, pytest.approx(32**-0.5))


@needs_te
def test_a_layer_s_parameters_have_transformer_engine_s_names(tmp_path: Path) -> None:
    [names] = on_ranks(1, layer_names, save_model(tmp_path, num_hidden_layers=2))
    assert names == [OWN_NAMES, OWN_NAMES]


@needs_te
def test_attention_communicates_as_the_recipe_says(tmp_path: Path) -> None:
    on_ranks(2, _attention, save_model(tmp_path / "m"))


# ---- checkpoints


def _there_and_back(model: Path, folder: Path) -> None:
    for saved_by in KINDS:
        save(saved_by, model, {"tp": 2}, folder / saved_by)
        for loaded_by in KINDS:
            assert load(loaded_by, model, {"pp": 2}, folder / saved_by) == saved_by


@needs_te
def test_a_checkpoint_of_one_kind_loads_in_every_other(tmp_path: Path) -> None:
    """Strictly, weights and optimizer, under another layout, in bf16 and FP8."""
    model = save_model(tmp_path / "m", dtype=torch.bfloat16, num_hidden_layers=2, tie_word_embeddings=False)
    on_ranks(2, _there_and_back, model, tmp_path)


# ---- three steps


@needs_te
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP1", "TP2 SP", "PP2"])
def test_three_steps_equal_the_float64_reference(layout: str, tmp_path: Path) -> None:
    """With kernels that torch plays."""
    folder = save_model(tmp_path, num_hidden_layers=2)
    spec = training.specs(folder, {"parallel": LAYOUTS[layout]})[:1]
    results = on_ranks(2 if LAYOUTS[layout] else 1, training.train_on_rank, spec, train_fused)
    training.compare(results, [reference(spec[0])])
