"""The quickstart's task, and a template for your own: combine three numbers to reach a target.

    prompt    4 9 2 make 7 :
    response  9 - 4 = 5 left 2 5 ; 5 + 2 = 7

The model is free to choose the next two numbers, and whether to add or subtract: these are the forks of the chain of thought. Every result,
separator and remaining number follows from the text before it.

`python recipes/quickstart/countdown.py OUT` writes

    OUT/model/         a small Qwen3 with random weights and its tokenizer, as a Hugging Face folder
    OUT/sft.jsonl      {"prompt", "response"}: the warm start's chains; some reach the target, the others miss it
    OUT/train.jsonl    {"prompt", "answer", "numbers"}: problems for reinforcement learning
    OUT/heldout.jsonl  the same, with problems that occur in neither of the other files, in any order of their numbers

A recipe names the verifier as `reward.verifier: recipes/quickstart/countdown.py:score`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub}
NUMBERS = 3  # per problem
HIGHEST = 10  # numbers are drawn from 1 .. HIGHEST
RIGHT_SHARE = 0.5  # of the warm start's chains: enough to learn that the target matters, and the rest is left to the reward
SFT_ROWS, HELDOUT_ROWS = 25_600, 128


class Step(NamedTuple):
    a: int
    operation: str
    b: int
    result: int


# --- steps: shared by the verifier and the generator ---


def steps(left: Sequence[int]) -> Iterator[Step]:
    """Every possible step on the remaining numbers, with each pair in both orders."""
    for a, b in itertools.permutations(left, 2):
        for name, operation in OPERATIONS.items():
            yield Step(a, name, b, operation(a, b))


def after(left: Sequence[int], step: Step) -> list[int]:
    """The numbers left after a step: the unused ones in their order, then the result."""
    rest = list(left)
    rest.remove(step.a)
    rest.remove(step.b)
    return [*rest, step.result]


def step_text(left: Sequence[int], step: Step) -> str:
    rest = after(left, step)
    text = f"{step.a} {step.operation} {step.b} = {step.result}"
    return f"{text} left {' '.join(map(str, rest))} ;" if len(rest) > 1 else text


# --- the verifier ---


def score(response: str, row: dict[str, Any]) -> float:
    """1.0 if `response` combines row["numbers"], each exactly once and with correct arithmetic, into int(row["answer"]); else 0.0.

    The text is compared with every possible next step and never evaluated: wrong arithmetic, an unavailable number or the bare answer
    earns nothing, and no text raises.
    """
    words, left = response.split(), [int(number) for number in row["numbers"]]
    while len(left) > 1:
        for step in steps(left):
            expected = step_text(left, step).split()
            if words[: len(expected)] == expected:
                break
        else:
            return 0.0
        words, left = words[len(expected) :], after(left, step)
    return float(not words and left == [int(row["answer"])])


# --- problems and chains of thought ---


class Problem(NamedTuple):
    numbers: tuple[int, ...]  # in ascending order
    target: int


def chains(left: Sequence[int]) -> Iterator[list[Step]]:
    """Every chain of thought with the larger number first and results above zero: no two differ only in the order of operands."""
    if len(left) == 1:
        yield []
    for step in sorted(set(steps(left))):
        if step.a >= step.b and step.result > 0:
            yield from ([step, *tail] for tail in chains(after(left, step)))


def chains_by_problem() -> dict[Problem, tuple[list[list[Step]], list[list[Step]]]]:
    """For every solvable problem, the chains that reach the target and those that miss it (at least one of each)."""
    table = {}
    for numbers in itertools.combinations_with_replacement(range(1, HIGHEST + 1), NUMBERS):
        every = list(chains(numbers))
        for target in sorted({chain[-1].result for chain in every}):
            right = [chain for chain in every if chain[-1].result == target]
            wrong = [chain for chain in every if chain[-1].result != target]
            if wrong:
                table[Problem(numbers, target)] = (right, wrong)
    return table


def prompt_text(numbers: Sequence[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))} make {target} :"


def response_text(numbers: Sequence[int], chain: Iterable[Step]) -> str:
    left, texts = list(numbers), []
    for step in chain:
        texts.append(step_text(left, step))
        left = after(left, step)
    return " ".join(texts)


def make_rows(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the files `sft`, `train` and `heldout`; the prompts within `train` and within `heldout` are all different."""
    choose = random.Random(seed)
    table = chains_by_problem()
    problems = list(table)
    choose.shuffle(problems)
    heldout, known = problems[:HELDOUT_ROWS], problems[HELDOUT_ROWS:]

    def warm_start_row() -> dict[str, Any]:
        problem = choose.choice(known)
        right, wrong = table[problem]
        chain = choose.choice(right if choose.random() < RIGHT_SHARE else wrong)
        numbers = choose.sample(problem.numbers, NUMBERS)
        return {"prompt": prompt_text(numbers, problem.target), "response": response_text(numbers, chain)}

    def row(numbers: Sequence[int], target: int) -> dict[str, Any]:
        return {"prompt": prompt_text(numbers, target), "answer": str(target), "numbers": list(numbers)}

    train = [row(numbers, target) for ascending, target in known for numbers in sorted(set(itertools.permutations(ascending)))]
    choose.shuffle(train)
    return {
        "sft": [warm_start_row() for _ in range(SFT_ROWS)],
        "train": train,
        "heldout": [row(choose.sample(problem.numbers, NUMBERS), problem.target) for problem in heldout],
    }


def write_rows(folder: Path, files: dict[str, list[dict[str, Any]]]) -> None:
    """Each list of rows as `folder`/NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the untrained model ---

SPECIAL = ("<pad>", "<eos>", "<unk>")
WIDTH, HEAD = 192, 32  # of the hidden states, and of an attention head; three heads share a key and a value


def vocabulary() -> list[str]:
    """One token per word: every number that can occur in a chain, operations and separators."""
    return [*map(str, range(NUMBERS * HIGHEST + 1)), *OPERATIONS, "=", "left", ";", "make", ":"]


def write_model(folder: Path, seed: int, words: Sequence[str] = (), width: int = WIDTH, experts: int = 0) -> None:
    """A Qwen3 with random parameters and a tokenizer of these words (by default this task's), as transformers and vLLM read them. 1.1
    million parameters for a width of 192; 0.3 for 96, and 4.4 for 384. With experts it is a Qwen3-MoE, of which a token uses two experts
    and as many parameters."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    ids = {word: number for number, word in enumerate([*SPECIAL, *(words or vocabulary())])}
    by_word = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    by_word.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    size: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD // 3,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,  # three times the usual: a model this small then learns its arithmetic in half the updates
        "bos_token_id": None,
        "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
    }
    torch.manual_seed(seed)
    if experts:
        of_experts = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * width, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **of_experts))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's model and data.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=1, help="seed of the problems, their split and the random weights")
    parser.add_argument("--width", type=int, default=WIDTH, choices=(96, 192, 384), help="of the model: 0.3, 1.1 or 4.4 million parameters")
    parser.add_argument("--experts", type=int, default=0, help="experts of each layer; 0: a dense model")
    arguments = parser.parse_args()
    write_rows(arguments.out, make_rows(arguments.seed))
    write_model(arguments.out / "model", arguments.seed, width=arguments.width, experts=arguments.experts)


if __name__ == "__main__":
    main()
