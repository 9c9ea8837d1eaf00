"""The mapping between Hugging Face tensors and Megatron's parameters, and the folders that they are read from and written to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import TINY, published, save_model
from torch import Tensor

from megafork.recipe import RecipeError
from megafork.shape import FAMILIES, Mixture, Shape, read_shape
from megafork.weights.huggingface import HuggingFaceWeights, write_folder
from megafork.weights.mapping import Parameter, huggingface_shapes, parameters, pieces, shard_shape

ARCHITECTURES = [name.removesuffix("ForCausalLM") for name in FAMILIES]

# ---- the table


def shape_of(architecture: str = "Qwen3", **sizes: Any) -> Shape:
    if architecture == "Qwen3Moe":
        sizes = {"moe": Mixture(4, 2, 16, True, (0,)), **sizes}
    small = {"layers": 2, "hidden": 16, "ffn": 24, "heads": 8, "kv_heads": 2, "head_dim": 4, "vocab": 99, "tied": True}
    rest = {"norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None, "max_positions": 64}
    return Shape(architecture=f"{architecture}ForCausalLM", **{**small, **rest, **sizes})


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Shape, int]:
    """A shape and a TP size that it can be split into."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    assume(max(kv_heads, tp) % min(kv_heads, tp) == 0)
    heads = kv_heads * draw(st.integers(1, 8))
    assume(heads % tp == 0)
    shape = shape_of(
        draw(st.sampled_from(ARCHITECTURES)),
        layers=draw(st.integers(1, 3)),
        hidden=8 * draw(st.integers(1, 3)),
        ffn=tp * draw(st.integers(1, 9)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 3)),
        vocab=draw(st.integers(1, 200)),
        tied=draw(st.booleans()),
    )
    return shape, tp


def megatron_shard(parameter: Parameter, full: dict[str, Tensor], shape: Shape, tp: int, rank: int) -> Tensor:
    """The shard by reshapes of whole tensors, as Megatron's layers define it."""
    tensors = [full[name] for name in parameter.huggingface()]
    layer, kind = f"model.layers.{parameter.layer}.", parameter.name.rpartition(".")[2]
    match parameter.rule.kind:
        case "vocab":
            padded = tensors[0].new_zeros(shape.padded_vocab(tp), shape.hidden)
            padded[: shape.vocab] = tensors[0]
            return padded.chunk(tp)[rank]
        case "qkv":
            rest = tensors[0].shape[1:]
            if shape.architecture == "Phi3ForCausalLM":
                keys = shape.kv_heads * shape.head_dim
                q, k, v = full[f"{layer}self_attn.qkv_proj.{kind}"].split([shape.heads * shape.head_dim, keys, keys])
            else:
                q, k, v = (full[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv")
            groups = [part.reshape(shape.kv_heads, -1, *rest) for part in (q, k, v)]
            return torch.cat(groups, 1).reshape(-1, *rest).chunk(tp)[rank]
        case "gated" if parameter.expert is not None:
            gate, up = (full[f"{layer}mlp.experts.{parameter.expert}.{part}_proj.weight"] for part in ("gate", "up"))
            return torch.cat([part.chunk(tp)[rank] for part in (gate, up)])
        case "gated":
            if shape.architecture == "Phi3ForCausalLM":
                gate, up = full[f"{layer}mlp.gate_up_proj.weight"].chunk(2)
            else:
                gate, up = (full[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up"))
            return torch.cat([part.chunk(tp)[rank] for part in (gate, up)])
        case "row":
            return tensors[0].chunk(tp, 1)[rank]
        case "replicated":
            return tensors[0]


def rectangle(tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int] | None) -> Tensor:
    part = tensor[rows[0] : rows[1]]
    return part if columns is None else part[:, columns[0] : columns[1]]


@settings(max_examples=150, deadline=None)
@given(shapes())
@example((shape_of(heads=8, kv_heads=1), 8))  # one KV group, cut among eight ranks
@example((shape_of(vocab=17), 8))  # the last ranks hold nothing but padding
@example((shape_of("Qwen2", heads=6, kv_heads=2, tied=False), 2))
@example((shape_of("Qwen3Moe", heads=8, kv_heads=2, tied=False), 4))  # a layer with experts, and one without
@example((shape_of("Phi3", heads=8, kv_heads=2, tied=False), 4))  # fused in the files, and half a KV group to a rank
def test_pieces_tile_every_shard_and_every_tensor_exactly_once(case: tuple[Shape, int]) -> None:
    shape, tp = case
    sizes = huggingface_shapes(shape)
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.rand(size, generator=generator) + 1 for name, size in sizes.items()}
    read = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}
    copies = {}
    for parameter in parameters(shape):
        copies.update(dict.fromkeys(parameter.huggingface(), tp if parameter.rule.kind == "replicated" else 1))
        for rank in range(tp):
            local = torch.zeros(shard_shape(parameter, shape, tp))
            written = torch.zeros(local.shape, dtype=torch.int64)
            for piece in pieces(parameter, shape, tp, rank):
                for (start, stop), size in zip(filter(None, (piece.rows, piece.columns)), sizes[piece.name], strict=False):
                    assert 0 <= start < stop <= size, f"{piece} reaches beyond the tensor"
                part = rectangle(full[piece.name], piece.rows, piece.columns)
                local[piece.at : piece.at + len(part)] = part
                written[piece.at : piece.at + len(part)] += 1
                rectangle(read[piece.name], piece.rows, piece.columns).add_(1)
            wanted = megatron_shard(parameter, full, shape, tp, rank)
            assert torch.equal(local, wanted), f"{parameter.name}, rank {rank} of {tp}"
            assert torch.equal(written, (wanted != 0).long()), f"{parameter.name}, rank {rank} of {tp}: a row written twice"
    for name, times in read.items():
        assert bool((times == copies[name]).all()), f"{name} is not held {copies[name]} times by the {tp} ranks"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_shapes_are_those_of_transformers(architecture: str, tied: bool, tmp_path: Path) -> None:
    import transformers

    changes: dict[str, Any] = {"tie_word_embeddings": tied, "num_key_value_heads": 1, "pad_token_id": None}
    if architecture == "Qwen3Moe":
        changes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]}
    config = getattr(transformers, f"{architecture}Config")(**{**TINY, **changes})
    with torch.device("meta"):
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    config.architectures = [f"{architecture}ForCausalLM"]
    config.save_pretrained(tmp_path)
    wanted = {name: tuple(tensor.shape) for name, tensor in published(model)}
    if tied:
        wanted.pop("lm_head.weight")
    assert huggingface_shapes(read_shape(tmp_path)) == wanted


def test_each_parameter_occurs_once_and_layers_count_over_the_whole_model() -> None:
    names = [parameter.name for parameter in parameters(shape_of(layers=12, tied=False))]
    assert len(names) == len(set(names))
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    assert [name for name in names if name.endswith("fc2.weight")] == [f"decoder.layers.{n}.mlp.linear_fc2.weight" for n in range(12)]


# ---- reading a folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed(model: Path, folder: Path, change: dict[str, Tensor | None]) -> HuggingFaceWeights:
    """The model with tensors replaced, added, or (None) left out."""
    tensors = {name: tensor for name, tensor in {**tensors_of(model), **change}.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors")
    return HuggingFaceWeights(folder)


def test_any_rectangle_is_read(model: Path) -> None:
    weights, tensors = HuggingFaceWeights(model), tensors_of(model)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights.read(name, (3, 40), (5, 96)), tensors[name][3:40, 5:96])
    assert torch.equal(weights.read(name, (63, 64)), tensors[name][63:64])
    assert torch.equal(weights.read("model.norm.weight", (2, 9)), tensors["model.norm.weight"][2:9])
    assert (weights.shape(name), weights.dtype(name), weights.names()) == ((64, 96), torch.float32, set(tensors))


def test_check_accepts_the_model_and_a_tied_head_that_is_written_twice(model: Path, tmp_path: Path) -> None:
    shape = read_shape(model)
    HuggingFaceWeights(model).check(shape)
    embedding = tensors_of(model)["model.embed_tokens.weight"]
    changed(model, tmp_path, {"lm_head.weight": embedding.clone(), "model.rotary_emb.inv_freq": torch.ones(16)}).check(shape)


def test_check_lists_every_difference(model: Path, tmp_path: Path) -> None:
    weights = changed(
        model,
        tmp_path,
        {
            "model.norm.weight": None,
            "model.layers.1.self_attn.q_norm.weight": None,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(128),
            "model.layers.0.mlp.up_proj.weight": torch.zeros(96, 65),
            "model.layers.0.mlp.gate_proj.weight": torch.zeros(96, 64, dtype=torch.float64),
        },
    )
    with pytest.raises(RecipeError) as caught:
        weights.check(read_shape(model))
    for difference in (
        f"model.path is {str(tmp_path)!r}",
        "missing model.norm.weight",
        "missing model.layers.1.self_attn.q_norm.weight",
        "unknown model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.weight is [96, 65], config.json says [96, 64]",
        "model.layers.0.mlp.gate_proj.weight has dtype F64",
    ):
        assert difference in str(caught.value)


def test_an_untied_model_without_a_head_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(RecipeError, match=r"missing lm_head\.weight"):
        HuggingFaceWeights(model).check(read_shape(tmp_path))


def test_a_long_list_of_differences_is_cut(model: Path) -> None:
    with pytest.raises(RecipeError, match=r"and [0-9]+ more") as caught:
        HuggingFaceWeights(model).check(shape_of(layers=9, hidden=64))
    assert len(str(caught.value)) < 1500


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"it has no model\.safetensors"):
        HuggingFaceWeights(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(kept: int, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:kept])
    with pytest.raises(RecipeError, match=r"model\.safetensors in .* is damaged or truncated"):
        HuggingFaceWeights(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(RecipeError, match="is a Git LFS pointer, not the weights: run `git lfs pull`"):
        HuggingFaceWeights(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.model.", "model.language_model.", ""])
def test_other_names_of_all_tensors_are_named(prefix: str, model: Path, tmp_path: Path) -> None:
    save_file({name.replace("model.", prefix, 1): tensor for name, tensor in tensors_of(model).items()}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=f"such as {prefix}embed_tokens.weight in place of model.embed_tokens.weight: save the model"):
        HuggingFaceWeights(tmp_path).check(read_shape(model))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"model.norm.weight": 3}}'])
def test_a_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RecipeError, match=r"model\.safetensors\.index\.json is not JSON with a weight_map"):
        HuggingFaceWeights(tmp_path)


# ---- writing a folder


def sharded(model: Path, folder: Path) -> Path:
    write_folder(folder, tensors_of(model).items(), like=model, shard_bytes=60_000)
    return folder


def test_shards_are_small_and_transformers_loads_them_bit_equal(model: Path, tmp_path: Path) -> None:
    import transformers

    target = sharded(model, tmp_path / "out")
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 64_000 for file in files)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(model).values())
    HuggingFaceWeights(target).check(read_shape(target))
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["converted", "as the tensors come"])
def test_dtype_is_that_of_the_config(dtype: torch.dtype | None, model: Path, tmp_path: Path) -> None:
    target, come = tmp_path / "out", torch.float32 if dtype else torch.bfloat16
    write_folder(target, ((name, tensor.to(come)) for name, tensor in tensors_of(model).items()), like=model, dtype=dtype)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(target)[name], tensor.to(torch.bfloat16)), name


def test_a_missing_shard_is_named(model: Path, tmp_path: Path) -> None:
    lost = sorted(sharded(model, tmp_path / "out").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(RecipeError, match=f"its index names {lost.name}, which are not there"):
        HuggingFaceWeights(tmp_path / "out")


def test_shards_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    files = sorted(sharded(model, tmp_path / "out").glob("*.safetensors"))
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(RecipeError, match=f"into {files[0].name}, which does not hold it"):
        HuggingFaceWeights(tmp_path / "out")


def test_an_interrupted_write_leaves_the_old_folder_whole(model: Path, tmp_path: Path) -> None:
    target = sharded(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors_of(model).items())[:5]
        raise ConnectionError("the other rank is gone")

    with pytest.raises(ConnectionError):
        write_folder(target, breaks_off(), like=model, shard_bytes=60_000)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before

    write_folder(target, tensors_of(model).items(), like=model)  # and the next write neither stumbles over the rest nor mixes with it
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("target_is_there", [True, False])
def test_a_write_after_one_that_was_killed_in_the_exchange(target_is_there: bool, model: Path, tmp_path: Path) -> None:
    for rest in (*(["out"] if target_is_there else []), "out.old", "out.writing"):
        sharded(model, tmp_path / rest)
    write_folder(tmp_path / "out", tensors_of(model).items(), like=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("leads", ["somewhere", "nowhere"])
def test_a_link_is_replaced_again_and_again(leads: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / leads)
    for _ in range(2):
        write_folder(tmp_path / "out", tensors_of(model).items(), like=model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "somewhere"]
