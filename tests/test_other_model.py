"""The model that is trained, evaluated and converted is the one in its folder; if that is ambiguous, every command refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import megafork
from safetensors.torch import load_file, save_file
from task import make_task, write_recipe
from tiny import save_model
from torch import Tensor

from megafork.commands import preflight
from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.convert.named import find_model
from megafork.plan.models import shape_for
from megafork.recipe import RecipeError
from megafork.recipe_file import load_recipe
from megafork.shape import read_shape
from megafork.weights import huggingface
from megafork.weights.huggingface import HuggingFaceWeights

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_task(tmp_path)
    write_recipe(tmp_path, run={"folder": "runs"}, model={"path": "model"}, data={"train": "train.jsonl", "eval": None})
    return tmp_path


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


COMMANDS: dict[str, tuple[Callable[[], Any], str]] = {
    "train": (lambda: preflight("train", load_recipe("recipe.yaml"), 1), "model.path is 'model'"),
    "sft": (lambda: preflight("sft", load_recipe("recipe.yaml"), 1), "model.path is 'model'"),
    "eval, analyze": (lambda: find_model("model").check(), "model.path is 'model'"),
    "convert": (lambda: hf_to_megatron(Path("model"), Path("out")), "SRC is 'model'"),
    "convert back": (lambda: megatron_to_hf(Path("model"), Path("out")), "SRC is 'model'"),
}


def refused_by_all(message: str) -> None:
    for name, (command, source) in COMMANDS.items():
        with pytest.raises(RecipeError) as caught:
            command()
        said = str(caught.value).replace("MODEL is", "model.path is")
        assert said.startswith(source) and message in said and "\n" not in said, name
        assert not Path("out").exists()


# ---- a head that config.json ties


def one_step_away(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] = torch.nextafter(tensors[HEAD][-1, -1], torch.tensor(9.0))


OTHER_HEADS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "another": (lambda t: t.update({HEAD: torch.randn_like(t[EMBEDDING])}), f"its {HEAD} is not its {EMBEDDING}"),
    "another in its last bit": (one_step_away, f"its {HEAD} is not its {EMBEDDING}"),
    "rounded": (lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}), f"its {HEAD} is not its {EMBEDDING}"),
    "of more rows": (lambda t: t.update({HEAD: torch.zeros(14, 64)}), f"{HEAD} is [14, 64], config.json says [13, 64]"),
    "of integers": (lambda t: t.update({HEAD: torch.zeros(13, 64, dtype=torch.int32)}), f"{HEAD} has dtype I32"),
}


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_a_tied_head_of_other_values(name: str, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = OTHER_HEADS[name]
    monkeypatch.setattr(huggingface, "_BAND", 1024)  # the last band is the one that differs
    edit_tensors(task / "model", change)
    if name == "rounded":  # convert has more to say of two dtypes
        with pytest.raises(RecipeError, match=message):
            preflight("train", load_recipe("recipe.yaml"), 1)
        return
    refused_by_all(message)


def test_a_tied_head_that_is_the_embedding(task: Path) -> None:
    edit_tensors(task / "model", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    preflight("train", load_recipe("recipe.yaml"), 1)
    hf_to_megatron(task / "model", task / "out")


def test_the_same_head_in_a_wider_dtype(task: Path) -> None:
    edit_tensors(task / "model", lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].bfloat16()}))
    edit_tensors(task / "model", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].float()}))
    preflight("train", load_recipe("recipe.yaml"), 1)


# ---- one file beside several


def test_a_single_file_beside_an_index(task: Path, tmp_path: Path) -> None:
    import transformers

    model = task / "model"
    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(task / "shards", max_shard_size=60_000)
    for file in (task / "shards").glob("model*"):
        shutil.copy(file, model)
    refused_by_all("it has a model.safetensors, which transformers loads, beside model.safetensors.index.json with other files")
    (model / "model.safetensors").unlink()
    preflight("train", load_recipe("recipe.yaml"), 1)


def test_an_index_of_the_single_file(task: Path) -> None:
    names = load_file(task / "model/model.safetensors")
    (task / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    preflight("train", load_recipe("recipe.yaml"), 1)


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), lambda path: path.write_text('{"weight_map":' * 100_000)], ids=["folder", "deep"]
)
def test_an_index_that_cannot_be_read(make: Callable[[Path], Any], task: Path) -> None:
    make(task / "model/model.safetensors.index.json")
    refused_by_all("its model.safetensors.index.json is not JSON with a weight_map")


# ---- quantised, or said to be


@pytest.mark.parametrize("config", [{"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "bitsandbytes"}, {}])
def test_a_quantisation_that_is_left_over(config: dict[str, Any], task: Path) -> None:
    edit_config(task / "model", quantization_config=config)
    refused_by_all("it is quantised (quantization_config); give the model it was made from")
    with pytest.raises(RecipeError, match="it is quantised"):
        shape_for(load_recipe("recipe.yaml"))  # megafork plan


# ---- a model's name


def test_home(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(task))
    recipe = load_recipe("recipe.yaml", ["model.path=~/model"])
    assert recipe.model.path == str(task / "model")
    assert preflight("sft", recipe, 1)[0].shape == find_model("~/model").check() == read_shape(task / "model")
    hf_to_megatron(Path("~/model"), Path("~/megatron"))
    megatron_to_hf(Path("~/megatron"), Path("~/back"))
    assert find_model("~/back").check() == read_shape(task / "model")
    assert find_model("~/megatron").checkpoint == task / "megatron"


def test_a_lora_folder(task: Path) -> None:
    shutil.rmtree(task / "model")
    (task / "model").mkdir()
    (task / "model/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-8B"}')
    refused_by_all("a LoRA adapter (adapter_config.json): merge it into its base model first")


def test_a_qwen2_of_heads_that_vllm_does_not_know(task: Path) -> None:
    make_task(task / "odd", architecture="Qwen2")  # head_dim 32, hidden_size 64, 4 heads
    with pytest.raises(RecipeError, match=r"the model's head_dim is 32: vLLM knows a Qwen2ForCausalLM only with .* = 16"):
        preflight("train", load_recipe("recipe.yaml", ["model.path=odd/model"]), 1)
    assert hf_to_megatron(task / "odd/model", task / "out").tensors == 26  # without vLLM it can be worked with


# ---- weights that are no numbers


def broken(name: str, value: float, row: int = -1) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1, tensors[name].size(-1))[row, -1] = value

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, EMBEDDING, "model.norm.weight"])
def test_a_weight_that_is_no_number(name: str, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", dtype=dtype, num_hidden_layers=2)
    edit_tensors(folder, broken(name, value))
    weights = HuggingFaceWeights(folder)
    weights.check(read_shape(folder))  # headers alone
    rows = weights.shape(name)[0]
    with pytest.raises(RecipeError, match=f"^model.path is '{folder}': its {name} holds NaN or infinity"):
        weights.read(name, (0, rows))
    assert len(weights.read(name, (0, rows - 1))) == rows - 1 or name == "model.norm.weight"
    largest = torch.finfo(dtype).max
    edit_tensors(folder, broken(name, largest))
    assert weights.read(name, (0, rows)).max() == largest


def test_no_conversion_and_no_engine_takes_them(task: Path) -> None:
    hf_to_megatron(task / "model", task / "megatron")
    edit_tensors(task / "model", broken(DOWN, float("nan")))
    for convert in (hf_to_megatron, megatron_to_hf):
        with pytest.raises(RecipeError, match=f"^SRC is '{task}/model': its {DOWN} holds NaN"):
            convert(task / "model", task / "out")
    with pytest.raises(RecipeError, match=f"^MODEL is 'model': its {DOWN} holds NaN"):
        list(find_model("model").tensors())
    assert not (task / "out").exists()

    [file] = (task / "megatron").glob("*.distcp")  # every byte of the tensors' pickles is there: change one number
    content, scale = file.read_bytes(), load_file(task / "model/model.safetensors")["model.norm.weight"].numpy().tobytes()
    assert content.count(scale) == 1
    file.write_bytes(content.replace(scale, scale[:-4] + b"\x00\x00\xc0\x7f"))
    for sums in (task / "megatron").glob("*.json"):
        if sums.name != "metadata.json":
            sums.unlink()
    with pytest.raises(RecipeError, match=r"^SRC is .*its decoder.final_layernorm.weight holds NaN"):
        megatron_to_hf(task / "megatron", task / "out")
    with pytest.raises(RecipeError, match=r"^MODEL is .*its decoder.final_layernorm.weight holds NaN"):
        list(find_model("megatron").tensors())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "recipe.yaml", "parallel.tp=2"),
        ("eval", "model", "--benchmarks=train.jsonl", "--template=plain", "--samples=1", "--max-tokens=2", "--kv-cache-mb=32"),
        ("analyze", "model", "--prompts=train.jsonl", "--out=study", "--template=plain", "--max-tokens=2", "--kv-cache-mb=32"),
    ],
    ids=["train", "eval", "analyze"],
)
def test_a_command_with_weights_that_are_no_numbers(arguments: tuple[str, ...], task: Path) -> None:
    """With TP 2 the second rank alone reads the last row."""
    edit_tensors(task / "model", broken(UP, float("nan")))
    done = megafork(*arguments, cwd=task)
    assert done.returncode == 2, done
    said = done.stderr.splitlines()[-1]  # vLLM may have warned of the machine
    assert said.startswith("megafork: ") and f"its {UP} holds NaN or infinity" in said and "Traceback" not in done.stderr
