"""Conversion between Hugging Face folders and Megatron checkpoints: bit-equal, loadable under any layout, written whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
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
from megafork.weights.checksums import write_sums
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy, local_parameters
from megafork.weights.shards import Spec, write_shards

TALK = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "chat_template.jinja": "{{ x }}", "tokenizer.model": "\x00\x01"}


def talking(folder: Path) -> Path:
    """Tokenizer files beside a model's weights."""
    for name, text in TALK.items():
        (folder / name).write_text(text)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    return folder


@dataclass
class Contents:
    """All that a Hugging Face folder says."""

    tensors: dict[str, Tensor]
    texts: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Contents:
        tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        texts: dict[str, Any] = {name: (folder / name).read_text() for name in TALK if (folder / name).exists()}
        return cls(tensors, texts | {name: json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")})

    def assert_same(self, other: Contents) -> None:
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name]), name
        assert self.texts == other.texts


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


@pytest.mark.parametrize(("model", "layout"), CASES)
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


# ---- wrong input, and interruptions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model(tmp_path / "in", dtype=torch.bfloat16)


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_written(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    wrong = {f"model.layers.0.self_attn.{part}_proj.bias": torch.zeros(8, dtype=torch.bfloat16) for part in "qkvo"}
    wrong |= {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(3, 3, dtype=torch.bfloat16) for n in range(4)}
    wrong |= {f"model.layers.{n}.mlp.gate_proj.weight": torch.zeros(96, 64) for n in range(4)}
    save_file(tensors | wrong, source / "model.safetensors")
    for target, convert in (("megatron", hf_to_megatron), ("hf", megatron_to_hf)):
        with pytest.raises(RecipeError) as caught:
            convert(source, tmp_path / target)
        said = str(caught.value)
        assert said.startswith(f"SRC is {str(source)!r}: its tensors do not fit its config.json: missing model.norm.weight; ")
        assert all(name in said for name in wrong)
        assert (
            "gate_proj.weight has dtype F32, config.json says BF16" in said
            and "up_proj.weight is [3, 3], config.json says [96, 64]" in said
        )
        assert said.endswith("; --dtype converts dtypes")
    assert names_in(tmp_path) == ["in"]


def test_several_dtypes_are_converted_when_told_so(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    hf_to_megatron(source, tmp_path / "megatron", dtype="bf16")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    after = Contents.of(tmp_path / "out").tensors
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp": 3}, r"^--tp is 3 but the model's attention has 128 rows: choose a tp that divides them"),
        ({"pp": 3}, r"^--pp is 3, but the model has 4 layers"),
        ({"tp": 0}, r"^--tp is 0 and --pp is 1: both must be 1 or more"),
    ],
)
def test_a_layout_that_does_not_fit(changes: dict[str, int], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        hf_to_megatron(source, tmp_path / "megatron", tp=changes.get("tp", 1), pp=changes.get("pp", 1))
    assert names_in(tmp_path) == ["in"]


def test_sources_and_targets_that_are_not(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^DST is .*in': it already exists"):
        hf_to_megatron(source, source)
    with pytest.raises(RecipeError, match=r"^DST is .*in': it already exists"):
        megatron_to_hf(tmp_path / "megatron", source)
    for convert in (hf_to_megatron, megatron_to_hf):
        with pytest.raises(RecipeError, match=r"^SRC is .*nowhere': no such folder"):
            convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"^SRC is .*empty': it has no config\.json"):
        hf_to_megatron(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(RecipeError, match=r"^SRC is .*empty': it has neither a config\.json nor a metadata\.json"):
        megatron_to_hf(tmp_path / "empty", tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(RecipeError, match=r"^SRC is .*in': it is quantised"):
        hf_to_megatron(source, tmp_path / "out")


def _edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], bool, str]] = {  # what is done, whether there are checksums, and what is said of it
    "file lost": (lambda folder: (folder / "__1_0.distcp").unlink(), True, r"damaged: __1_0\.distcp is missing"),
    "file cut": (lambda folder: _cut(folder / "__1_0.distcp"), True, r"damaged: __1_0\.distcp has \d+ of \d+ bytes"),
    "bit changed": (lambda folder: _flip(folder / "__0_0.distcp"), True, r"damaged: __0_0\.distcp is not what was written"),
    "index changed": (lambda folder: _flip(folder / ".metadata"), True, r"damaged: \.metadata is not what was written"),
    "file lost, no sums": (lambda folder: (folder / "__1_0.distcp").unlink(), False, r"damaged: __1_0\.distcp is missing"),
    "file cut, no sums": (lambda folder: _cut(folder / "__1_0.distcp"), False, r"damaged: __1_0\.distcp has \d+ of \d+ bytes"),
    "index lost, no sums": (lambda folder: (folder / ".metadata").unlink(), False, r"damaged: it has no \.metadata"),
    "index cut, no sums": (lambda folder: _cut(folder / ".metadata"), False, r"damaged: its index cannot be read"),
    "other format, no sums": (lambda folder: _edit_json(folder / "metadata.json", sharded_backend="zarr"), False, r"its format is 'zarr'"),
    "config lost": (lambda folder: shutil.rmtree(folder / "hf"), False, r"does not name its model; put .* into '.*/hf'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(damage: str, source: Path, tmp_path: Path) -> None:
    done, sums, message = DAMAGE[damage]
    hf_to_megatron(source, tmp_path / "megatron", tp=2)
    if not sums:
        (tmp_path / "megatron" / "checksums.json").unlink()
    done(tmp_path / "megatron")
    with pytest.raises(RecipeError, match=message) as caught:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert str(caught.value).startswith("SRC is ")
    assert names_in(tmp_path) == ["in", "megatron"]


def test_a_checkpoint_of_another_model(source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "megatron")
    _edit_json(
        tmp_path / "megatron" / "hf" / "config.json",
        num_hidden_layers=3,
        layer_types=None,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
    )
    write_sums(tmp_path / "megatron")
    with pytest.raises(RecipeError) as caught:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert "unknown decoder.layers.self_attention.q_layernorm.weight" in str(caught.value)
    assert "decoder.layers.mlp.linear_fc2.weight is [4, 64, 96], config.json says [3, 64, 96]" in str(caught.value)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_conversion_leaves_nothing(there: bool, verify: bool, source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "megatron")
    done = 0

    def stop(now: int, total: int) -> None:
        nonlocal done
        done += now
        if done > total * 0.7:
            raise KeyboardInterrupt

    before = names_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        if there:
            hf_to_megatron(source, tmp_path / "out", progress=stop, verify=verify)
        else:
            megatron_to_hf(tmp_path / "megatron", tmp_path / "out", progress=stop, verify=verify)
    assert names_in(tmp_path) == before


# ---- memory


def _peak(convert: Callable[..., Converted], source: Path, target: Path, options: dict[str, Any]) -> int:
    """Bytes that a conversion adds to those of the process, at most."""

    def resident(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    convert(source, target, **options)
    return resident("VmHWM") - before


def _large_model(folder: Path) -> int:
    """About 1 GB of random bits in bf16, none of them of NaN; the bytes of its largest layer (the embedding counts as one)."""
    save_model(folder, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    _edit_json(folder / "config.json", **sizes, num_hidden_layers=8, vocab_size=50_000, dtype="bfloat16", layer_types=None)
    from megafork.weights.mapping import huggingface_shapes

    shapes = huggingface_shapes(read_shape(folder))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, size in shapes.items():
            yield name, torch.empty(size, dtype=torch.int16).random_(0x7F80).view(torch.bfloat16)

    write_shards(folder, [Spec(name, size, torch.bfloat16) for name, size in shapes.items()], tensors(), shard_bytes=512 << 20)
    layer = sum(2 * math.prod(size) for name, size in shapes.items() if name.startswith("model.layers.0."))
    return max(layer, 2 * math.prod(shapes["model.embed_tokens.weight"]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_stays_under_two_layers(tmp_path: Path) -> None:
    largest = _large_model(tmp_path / "in")
    whole = sum(file.stat().st_size for file in (tmp_path / "in").glob("*.safetensors"))
    assert whole > 4 * largest, "a conversion that holds the model is found"
    for function, source, target, options in ((hf_to_megatron, "in", "megatron", {"tp": 2}), (megatron_to_hf, "megatron", "out", {})):
        [peak] = on_ranks(1, _peak, function, tmp_path / source, tmp_path / target, options)
        assert 0 < peak < 2 * largest, f"{function.__name__}: {peak >> 20} MiB, two layers are {2 * largest >> 20}"
        shutil.rmtree(tmp_path / source)  # 1 GB
