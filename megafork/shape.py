"""The shape of a dense transformer as a Hugging Face config.json tells it, and which layouts it can be split into."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.recipe import Parallel, RecipeError

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense transformer, in Hugging Face's meaning."""

    architecture: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_positions: int

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "Qwen3ForCausalLM"

    @property
    def qkv_bias(self) -> bool:
        return self.architecture == "Qwen2ForCausalLM"

    def padded_vocab(self, tp: int) -> int:
        """Rows of embedding and head: the vocabulary rounded up so that every TP rank holds equally many."""
        multiple = math.lcm(16, tp)
        return -(-self.vocab // multiple) * multiple


def read_shape(folder: Path) -> Shape:
    """The shape in a Hugging Face folder's config.json. Raises RecipeError for a missing file or another architecture."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise RecipeError(f"model.path is {str(folder)!r}: no such folder; give a Hugging Face model folder")
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise RecipeError(f"model.path is {str(folder)!r}: it has no config.json; give a Hugging Face model folder") from None
    except ValueError as error:
        raise RecipeError(f"model.path is {str(folder)!r}: its config.json is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise RecipeError(f"model.path is {str(folder)!r}: its config.json holds a {type(config).__name__}, not a Hugging Face config")
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise RecipeError(f"model.path is {str(folder)!r}, a {architecture}: megafork trains {', '.join(ARCHITECTURES)}")
    for name, trained in (("hidden_act", "silu"), ("use_sliding_window", False)):  # no tensor would show that these differ
        if config.get(name, trained) != trained:
            raise RecipeError(f"model.path is {str(folder)!r}: its {name} is {config[name]!r}, megafork trains models with {trained!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        return Shape(
            architecture=architecture,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
            max_positions=config.get("max_position_embeddings", 0),
        )
    except KeyError as error:
        raise RecipeError(f"model.path is {str(folder)!r}: its config.json lacks {error}") from None


def check_world(layout: Parallel, ranks: int) -> None:
    """Refuse a number of ranks that the layout does not divide."""
    if ranks % layout.model_size:
        raise RecipeError(
            f"parallel.tp x pp x cp is {layout.tp} x {layout.pp} x {layout.cp} = {layout.model_size}, which does not divide the {ranks} "
            "ranks: start a multiple of it (run.ranks), or choose a smaller layout"
        )


def check_engines(rollout_tp: int, ranks: int) -> None:
    """Refuse roll-out engines that do not share the ranks evenly."""
    if ranks % rollout_tp:
        raise RecipeError(f"rollout.tp is {rollout_tp}, which does not divide the {ranks} ranks: choose one that does")


def check_rollout_tp(shape: Shape, tp: int) -> None:
    """Refuse an engine of more ranks than share the attention heads evenly."""
    if shape.heads % tp:
        raise RecipeError(f"rollout.tp is {tp} but the model has {shape.heads} attention heads: choose a tp that divides them")


def stage_layers(layers: int, layout: Parallel) -> list[int]:
    """Layers of each pipeline stage: as given for the first and the last, the rest shared equally (rounded down: see `check_layout`)."""
    given = {0: layout.first_stage_layers, layout.pp - 1: layout.last_stage_layers}
    fixed = {stage: count for stage, count in given.items() if count is not None}
    rest = (layers - sum(fixed.values())) // max(layout.pp - len(fixed), 1)
    return [fixed.get(stage, rest) for stage in range(layout.pp)]


def stage_of_layer(layers: int, layout: Parallel) -> list[int]:
    """The pipeline stage that holds each layer. With vpp the model goes round the stages vpp times."""
    counts = stage_layers(layers, layout)
    return [stage for _ in range(layout.vpp) for stage, count in enumerate(counts) for _ in range(count // layout.vpp)]


def check_layout(shape: Shape, layout: Parallel) -> None:
    """Refuse a layout that this model cannot be split into, naming the reason."""
    if shape.heads % layout.tp:
        raise RecipeError(f"parallel.tp is {layout.tp} but the model has {shape.heads} attention heads: choose a tp that divides them")
    if max(shape.kv_heads, layout.tp) % min(shape.kv_heads, layout.tp):
        raise RecipeError(
            f"parallel.tp is {layout.tp} but the model has {shape.kv_heads} key-value heads: one must be a multiple of the other"
        )
    for name, size in (("hidden_size", shape.hidden), ("intermediate_size", shape.ffn)):
        if size % layout.tp:
            raise RecipeError(f"parallel.tp is {layout.tp} but the model's {name} is {size}: choose a tp that divides it")
    counts = stage_layers(shape.layers, layout)
    if min(counts) < 1 or sum(counts) != shape.layers or any(count % layout.vpp for count in counts):
        given = {"first_stage_layers": layout.first_stage_layers, "last_stage_layers": layout.last_stage_layers, "vpp": layout.vpp}
        rest = "".join(f", {name} {value}" for name, value in given.items() if value not in (None, 1))
        raise RecipeError(
            f"parallel.pp is {layout.pp}{rest}, but the model has {shape.layers} layers: each stage needs equally many in each of its vpp "
            "parts, and all stages but the first and the last equally many; choose other numbers"
        )
    if shape.rope_scaling is not None and shape.rope_scaling.get("rope_type") != "llama3":
        raise RecipeError(f"the model's rope scaling is {shape.rope_scaling.get('rope_type')!r}: megafork knows `default` and `llama3`")
