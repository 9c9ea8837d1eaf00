"""A tiny program synthesis task, judged by running the programs (`reward.verifier: code`): the prompt names steps, the program does them.

    prompt    double, decrement, square:
    response  ```python
              x = int(input())
              x = x + x
              x = x - 1
              x = x * x
              print(x)
              ```

The model is free to choose how a step is written (x + x, x * 2, 2 * x): these are the forks. The rest of a program is forced.

`python recipes/code/pipelines.py OUT` writes

    OUT/model/         a small Qwen3 with random weights and its tokenizer, as a Hugging Face folder
    OUT/sft.jsonl      {"prompt", "response"}: the warm start's programs; many of them contain a wrong step
    OUT/train.jsonl    {"prompt", "input_output"}: problems with their tests, in the format of APPS
    OUT/heldout.jsonl  the same, with problems that occur in neither of the other files
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Step(NamedTuple):
    does: Callable[[int], int]
    right: tuple[str, ...]
    wrong: tuple[str, ...]


STEPS = {
    "double": Step(lambda x: 2 * x, ("x + x", "x * 2", "2 * x"), ("x + 2", "x * x")),
    "triple": Step(lambda x: 3 * x, ("x + x + x", "x * 3", "3 * x"), ("x + 3", "x + x")),
    "square": Step(lambda x: x * x, ("x * x", "x ** 2"), ("x * 2", "x + x")),
    "halve": Step(lambda x: x // 2, ("x // 2", "x >> 1"), ("x - 2", "x // 3")),
    "increment": Step(lambda x: x + 1, ("x + 1", "1 + x"), ("x + 2", "x - 1")),
    "decrement": Step(lambda x: x - 1, ("x - 1", "x + - 1"), ("1 - x", "x - 2")),
    "negate": Step(lambda x: -x, ("- x", "0 - x"), ("x - 0", "1 - x")),
    "mirror": Step(lambda x: 10 - x, ("10 - x", "- x + 10"), ("x - 10", "10 + x")),
}
LENGTH = 3  # steps per problem
INPUTS = (-3, 4, 9)
RIGHT_SHARE = 0.7  # of the warm start's steps: a third of its programs are right
SFT_ROWS, HELDOUT_ROWS = 12_800, 96


def prompt_text(names: Sequence[str]) -> str:
    return f"{', '.join(names)}:\n"


def program_text(expressions: Sequence[str]) -> str:
    steps = "".join(f"x = {expression}\n" for expression in expressions)
    return f"```python\nx = int(input())\n{steps}print(x)\n```"


def row(names: Sequence[str]) -> dict[str, Any]:
    outputs = []
    for value in INPUTS:
        for name in names:
            value = STEPS[name].does(value)
        outputs.append(f"{value}\n")
    return {"prompt": prompt_text(names), "input_output": json.dumps({"inputs": [f"{value}\n" for value in INPUTS], "outputs": outputs})}


def make_rows(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the files `sft`, `train` and `heldout`; held-out problems occur in neither of the others."""
    choose = random.Random(seed)
    problems = list(itertools.product(STEPS, repeat=LENGTH))
    choose.shuffle(problems)
    heldout, known = problems[:HELDOUT_ROWS], problems[HELDOUT_ROWS:]

    def warm_start_row() -> dict[str, Any]:
        names = choose.choice(known)
        steps = [STEPS[name] for name in names]
        expressions = [choose.choice(step.right if choose.random() < RIGHT_SHARE else step.wrong) for step in steps]
        return {"prompt": prompt_text(names), "response": program_text(expressions)}

    return {
        "sft": [warm_start_row() for _ in range(SFT_ROWS)],
        "train": [row(names) for names in known],
        "heldout": [row(names) for names in heldout],
    }


SPECIAL = ("<pad>", "<eos>", "<unk>")
PIECES = ("```python\n", "x = int(input())\n", "print(x)\n", "```", "x = ", "x", "\n", " + ", " - ", "- ", " * ", " ** ", " // ", " >> ")
MARKS = (", ", ":\n", "10", "0", "1", "2", "3")


def vocabulary() -> list[str]:
    return [*SPECIAL, *PIECES, *MARKS, *STEPS]


def write_model(folder: Path, seed: int) -> None:
    """A Qwen3 with 0.4 million random parameters, and a tokenizer that splits text into the task's pieces, longest first."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    ids = {piece: number for number, piece in enumerate(vocabulary())}
    pieces = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    longest_first = sorted(vocabulary()[len(SPECIAL) :], key=len, reverse=True)
    pieces.pre_tokenizer = Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated")
    pieces.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.06,  # as in the quickstart
        bos_token_id=None,
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model and data of the code task.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=1, help="seed of the problems, their split and the random weights")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(arguments.seed).items():
        (arguments.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(arguments.out / "model", arguments.seed)


if __name__ == "__main__":
    main()
