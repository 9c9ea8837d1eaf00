"""Conversion between Hugging Face folders and Megatron checkpoints: bit-equal, loadable under any layout, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Contents, names_in, talking
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tiny import MODELS, recipe, save_model
from torch import Tensor
from training import Rig

from megafork.convert.convert import Converted, hf_to_megatron, megatron_to_hf
from megafork.convert.sources import open_source
from megafork.convert.verify import VerifyError, compare_logits, compare_tensors
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe, RecipeError
from megafork.shape import read_shape
from megafork.weights.checkpoint import Checkpoints
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy, local_parameters
from megafork.weights.shards import Spec, write_shards

# ---- there and back


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_bit_equal(model: str, tp: int, pp: int, tmp_path: Path) -> None:
    architecture, changes = MODELS[model]
    source = talking(save_model(tmp_path / "in", architecture, dtype=torch.bfloat16, **changes))
    before = Contents.of(source)
    ticks: list[tuple[int, int]] = []
    done = hf_to_megatron(source, tmp_path / "megatron", tp=tp, pp=pp, progress=lambda *tick: ticks.append(tick))
    size = sum(tensor.nbytes for tensor in before.tensors.values())
    assert (done.tensors, done.bytes) == (len(before.tensors), size)
    assert abs(sum(tick[0] for tick in ticks) - size) <= 2 * 2 * 64 * 16, "all of it is told of, and the vocabulary's padding"
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == tp * pp, "a file for each rank of the layout"
    shutil.rmtree(source)  # the way back needs nothing else
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    before.assert_same(Contents.of(tmp_path / "out"))
    assert names_in(tmp_path) == ["megatron", "out"], "no temporary folder is left"


def test_a_model_in_shards(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", dtype=torch.bfloat16)
    before = Contents.of(source)
    (source / "model.safetensors").unlink()
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in before.tensors.items()]
    write_shards(source, specs, before.tensors.items(), shard_bytes=60_000)
    assert len(list(source.glob("model-000*-of-000*.safetensors"))) > 4
    assert all(file.stat().st_size < 66_000 for file in source.glob("*.safetensors"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.tensors.values())
    hf_to_megatron(source, tmp_path / "megatron", tp=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    before.assert_same(Contents.of(tmp_path / "out"))


@pytest.mark.parametrize(("come", "go"), [("fp32", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("where", ["there", "back", "Hugging Face alone"])
def test_dtype(come: str, go: Any, where: str, tmp_path: Path) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    source = save_model(tmp_path / "in", dtype=dtypes[come])
    if where == "Hugging Face alone":
        megatron_to_hf(source, tmp_path / "out", dtype=go, verify=True)
    else:
        hf_to_megatron(source, tmp_path / "megatron", dtype=go if where == "there" else "keep")
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", dtype=go if where == "back" else "keep")
    before, after = Contents.of(source), Contents.of(tmp_path / "out")
    assert after.texts["config.json"]["dtype"] == str(dtypes[go]).removeprefix("torch.")
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor.to(dtypes[go]), after.tensors[name]) and after.tensors[name].dtype == dtypes[go], name


# ---- megatron-core loads it, and a run's checkpoints come back


def _load_and_compare(spec: Recipe, folders: list[Path]) -> list[str]:
    """Load each checkpoint as megatron-core does, strictly; which parameters are not those that the Hugging Face folder gives?"""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    source = HuggingFaceWeights(Path(spec.model.path))
    shape = read_shape(source.folder)
    loaded, wanted = build_policy(shape, PolicyConfig.of(spec), mesh), build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(wanted, source, shape, mesh)
    different = []
    for folder in folders:
        for parameter in local_parameters(loaded).values():
            parameter.data.fill_(7.0)
        content = {f"model{n}": chunk.sharded_state_dict(metadata={"dp_cp_group": mesh.token_group}) for n, chunk in enumerate(loaded)}
        weights = dist_checkpointing.load(content, str(folder), strict=StrictHandling.RAISE_ALL)
        for n, chunk in enumerate(loaded):
            chunk.load_state_dict(weights[f"model{n}"])
        found = local_parameters(loaded)
        different += [name for name, parameter in local_parameters(wanted).items() if not torch.equal(parameter, found[name])]
    return different


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2 PP2": {"tp": 2, "pp": 2},
    "TP4 SP": {"tp": 4, "sp": True},
    "PP2 VPP2": {"pp": 2, "vpp": 2},
    "PP3 uneven": {"pp": 3, "first_stage_layers": 1, "last_stage_layers": 1},
    "EP2": {"ep": 2},
    "EP2 ETP2 TP2": {"ep": 2, "etp": 2, "tp": 2, "sp": True},
    "EP2 PP2": {"ep": 2, "pp": 2},
}


CASES = [
    *((model, layout) for model in ("tied", "untied", "Qwen2.5 untied", "Phi-4") for layout in LAYOUTS if "EP" not in layout),
    *((model, layout) for model in ("MoE", "MoE, some layers dense") for layout in LAYOUTS if "EP" in layout),
]
MARKED = [pytest.param(*case, marks=() if case[0] in ("tied", "MoE") else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Path]]]:
    """The folder of each of MODELS, and the checkpoints made of it for two layouts."""

    @cache
    def make(model: str) -> tuple[Path, list[Path]]:
        architecture, changes = MODELS[model]
        folder = tmp_path_factory.mktemp("converted")
        source, made = save_model(folder / "in", architecture, **changes), [folder / "1", folder / "2"]
        for size, target in enumerate(made, 1):
            hf_to_megatron(source, target, tp=size, pp=size)
        return source, made

    return make


@pytest.mark.parametrize(("model", "layout"), MARKED)
def test_megatron_loads_it_under_any_layout(model: str, layout: str, converted: Any) -> None:
    source, folders = converted(model)
    spec = recipe(source, parallel=LAYOUTS[layout])
    world = spec.parallel.smallest_world
    assert on_ranks(world, _load_and_compare, spec, folders) == [[]] * world


def _train_and_save(spec: Recipe, folder: Path) -> dict[str, Tensor]:
    rig = Rig(spec)
    rig.step(0)
    Checkpoints(folder, rig.mesh, keep_last=2).save(1, rig.learner.chunks, rig.learner.optimizer, {"recipe": spec.model_dump(mode="json")})
    return rig.weights()


@pytest.mark.parametrize("layout", [{"tp": 2, "sp": True}, {"pp": 2, "vpp": 2}], ids=["TP2 SP", "PP2 VPP2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_runs_checkpoint_becomes_a_folder(tied: bool, layout: dict[str, Any], tmp_path: Path) -> None:
    source = talking(save_model(tmp_path / "in", tie_word_embeddings=tied))
    spec = recipe(source, parallel=layout, train={"micro_batch_tokens": 64}, optimizer={"lr": 1e-2, "eps": 1e-2})
    trained = on_ranks(2, _train_and_save, spec, tmp_path / "checkpoints")[0]
    assert on_ranks(1, _verified, megatron_to_hf, tmp_path / "checkpoints" / "step_000001", tmp_path / "out")[0] < 1e-4
    before, after = Contents.of(source), Contents.of(tmp_path / "out")
    assert after.texts == before.texts
    assert after.tensors.keys() == trained.keys() == before.tensors.keys()
    for name, tensor in trained.items():
        assert torch.equal(after.tensors[name], tensor), name
    assert not torch.equal(after.tensors["model.norm.weight"], before.tensors["model.norm.weight"]), "it was trained"

    shutil.rmtree(source)
    with pytest.raises(RecipeError, match=r"model.path .*in' has no config.json; put the model's config.json .* into .*step_000001/hf'"):
        megatron_to_hf(tmp_path / "checkpoints" / "step_000001", tmp_path / "again")
    with pytest.raises(RecipeError, match=r"a run: give one of its checkpoints, such as .*step_000001'"):
        megatron_to_hf(tmp_path, tmp_path / "again")


# ---- verify


def _verified(convert: Callable[..., Converted], source: Path, target: Path, **options: Any) -> float | None:
    """A rank of its own: a process that has had a process group can no longer fork others."""
    return convert(source, target, verify=True, **options).logit_difference


def _fault(huggingface: Path, megatron: Path) -> str:
    try:
        return f"differ by {compare_logits(huggingface, megatron, read_shape(huggingface), torch.float32)}"
    except VerifyError as error:
        return str(error)


@pytest.mark.parametrize("architecture", ["Qwen2", "Mistral", "Phi3"])
def test_verify_compares_logits(architecture: str, tmp_path: Path) -> None:
    one, two = (save_model(tmp_path / str(seed), architecture, seed=seed, tie_word_embeddings=False) for seed in (1, 2))
    assert on_ranks(1, partial(_verified, tp=2, pp=2), hf_to_megatron, one, tmp_path / "megatron")[0] < 1e-4
    assert on_ranks(1, partial(_verified, dtype="bf16"), hf_to_megatron, one, tmp_path / "bf16")[0] < 1e-4, "of rounded weights"
    assert on_ranks(1, _fault, two, tmp_path / "megatron")[0].startswith("--verify: the logits of Megatron and transformers differ by")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.self_attn.k_proj.weight"])
def test_verify_sees_one_bit(name: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", dtype=torch.bfloat16)
    hf_to_megatron(source, tmp_path / "megatron")
    tensors = load_file(source / "model.safetensors")
    compare_tensors(open_source(source, keep=True), open_source(tmp_path / "megatron", keep=True), lambda done: None)
    tensors[name].view(torch.int16).view(-1)[5] ^= 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(VerifyError, match=f"^--verify: {name}: differ from the source when read back"):
        compare_tensors(open_source(source, keep=True), open_source(tmp_path / "megatron", keep=True), lambda done: None)
