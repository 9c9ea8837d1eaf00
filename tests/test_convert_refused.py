"""Conversions of wrong input, and interrupted ones: one clear error, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Contents, edit_json, names_in
from safetensors.torch import load_file, save_file
from tiny import save_model

from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.recipe import RecipeError
from megafork.weights.checksums import write_sums


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
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for convert in (hf_to_megatron, megatron_to_hf):
        with pytest.raises(RecipeError, match=r"^DST is .*link': it already exists"):
            convert(source, tmp_path / "link")
        with pytest.raises(RecipeError, match=r"^DST is .*out': '.*file' is not a folder that can be written to"):
            convert(source, tmp_path / "file" / "deep" / "out")
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
    "other format, no sums": (lambda folder: edit_json(folder / "metadata.json", sharded_backend="zarr"), False, r"its format is 'zarr'"),
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
    edit_json(
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
