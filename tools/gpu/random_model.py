"""A Qwen3 with random weights and another model's tokenizer: `python tools/gpu/random_model.py OUT SIZE TOKENIZER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES = {
    "tiny": dict(zip(NAMES, (64, 64, 96, 2, 4, 32), strict=True)),
    "blocks": dict(zip(NAMES, (64, 256, 768, 2, 4, 64), strict=True)),  # the smallest with whole blocks of 128 x 128 on both sides
    "qwen3-0.6b": dict(zip(NAMES, (151_936, 1024, 3072, 28, 16, 128), strict=True)),
}


def write(folder: Path, size: str, tokenizer: Path) -> None:
    sizes = SIZES[size]
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"] // 2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.06 if size == "blocks" else 0.02,
    )
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config.eos_token_id, config.pad_token_id = words.eos_token_id, words.pad_token_id
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
