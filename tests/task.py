"""A tiny task for whole runs: say which of two digits is larger. A random model learns it in seconds; each answer is one token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from tiny import save_model
from tokenizers import Tokenizer, models, pre_tokenizers

from megafork.user_code import import_file

WORDS = ["<eos>", "max", "=", *map(str, range(10))]


def make_task(folder: Path, **model: Any) -> Path:
    """Write model/ (with a tokenizer), train.jsonl and held_out.jsonl into `folder`."""
    import transformers

    save_model(folder / "model", **{"vocab_size": len(WORDS), "num_hidden_layers": 2, **model})
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "model")
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(1).shuffle(pairs)
    for name, part in (("train", pairs[:80]), ("held_out", pairs[80:])):
        rows = [{"prompt": f"max {a} {b} =", "answer": str(max(a, b)), "response": str(max(a, b))} for a, b in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe for the task in `folder`, with changes; its run folder is folder/runs/run."""
    base: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "folder": str(folder / "runs"), "seed": 7},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "held_out.jsonl"), "max_prompt_length": 8},
        "rollout": {
            "prompts": 8,
            "samples": 4,
            "max_response_length": 4,
            "kv_cache_mb": 32,
            "max_refills": 2,
            "max_empty_steps": 1000,  # a random model is wrong for many steps
        },
        "reward": {"verifier": "exact", "overlong": "none"},
        "optimizer": {"lr": 3e-3},
        "precision": {"dtype": "fp32"},
        "train": {"steps": 3, "minibatches": 2, "micro_batch_tokens": 64},
        "log": {"tensorboard": False},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}))
    return file


SOURCE = Path(__file__).parents[1] / "recipes" / "quickstart" / "countdown.py"


countdown = import_file(SOURCE, "countdown")  # recipes are not a package
