"""Tiny Hugging Face models and recipes for the tests, generated on the fly from a seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megafork.recipe import Recipe
from megafork.rollout.engine import Weights
from megafork.weights.huggingface import HuggingFaceWeights

TINY = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen3", {}),
    "untied": ("Qwen3", {"tie_word_embeddings": False}),
    "one KV head": ("Qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "Qwen2.5": ("Qwen2", {}),
    "Qwen2.5 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "Llama": ("Llama", {"tie_word_embeddings": False}),
    "Mistral": ("Mistral", {"tie_word_embeddings": False}),
    "MoE": ("Qwen3Moe", {"tie_word_embeddings": False}),
    "MoE, some layers dense": (
        "Qwen3Moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
    ),
    "Phi-4": ("Phi3", {"tie_word_embeddings": False}),
    "Phi-4, tied, one KV head": ("Phi3", {"num_key_value_heads": 1}),
}
"""Each family of the table, in the forms that make a difference to its tensors."""
_CONFIG: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "Phi3": {"pad_token_id": None, "eos_token_id": None},
}
"""What else an architecture needs: few small experts; and transformers' defaults for Phi-3's tokens lie beyond a tiny vocabulary."""


def save_model(folder: Path, architecture: str = "Qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of the architecture as a Hugging Face folder; norms and biases are random too, so that a swap shows."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**{**TINY, **_CONFIG.get(architecture, {}), **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def published(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under the names of its files, in which every expert has its own."""
    for name, tensor in model.state_dict().items():
        head, of_experts, kind = name.partition(".experts.")
        if not of_experts:
            yield name, tensor
        for expert, weight in enumerate(tensor) if of_experts else ():
            gate_up = dict(zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True))
            for part, rows in gate_up.items() if kind == "gate_up_proj" else [(kind, weight)]:
                yield f"{head}.experts.{expert}.{part}.weight", rows


class FolderWeights:
    """The tensors of a Hugging Face folder, which may be another at the next pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        source = HuggingFaceWeights(self.folder)
        return ((name, source.read(name, (0, source.shape(name)[0]))) for name in sorted(source.names()))


class Chosen:
    """The weights that `source` has at each pass; one source may take the place of another."""

    def __init__(self, source: Weights) -> None:
        self.source = source

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.source)


def recipe(model: Path, /, **sections: dict[str, Any]) -> Recipe:
    """A small fp32 recipe with the given changes."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "data": {"train": "unused.jsonl", "max_prompt_length": 32},
        "rollout": {"prompts": 4, "samples": 4, "max_response_length": 32},
        "reward": {"overlong": "none"},
        "precision": {"dtype": "fp32"},
        "optimizer": {"lr": 1e-3, "eps": 1e-3},  # a large eps: Adam would blow rounding of tiny gradients up to full steps
    }
    return Recipe.model_validate({name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}})


PROMPTS = [list(range(3, 3 + n)) for n in (1, 5, 17, 31)]


SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


CHAT = (
    "{% for m in messages %}{% if m.role not in ('system', 'user') %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, **config: Any) -> str:
    """A byte-level BPE as Qwen's, small."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = ["Solve the problem: what is 1 + 2? A: 3, für €5"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )  # as Llama's, a first token
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)
