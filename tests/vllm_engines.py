"""vLLM's engines of two models, and what they answer to fixed requests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from tiny import save_model
from torch import Tensor

from megafork.compat import vllm as vllm_fixes
from megafork.rollout.engine import Request, Sampling, request_seed
from megafork.weights.huggingface import HuggingFaceWeights

Answers = list[tuple[list[int], list[float]]]


LONG = 280
"""More tokens than a block of the prefix cache."""


PROMPTS = [[(3 * i + n) % 99 for i in range(n)] for n in (1, 5, 31, LONG)]


REQUESTS = [Request(prompt, request_seed(1, n, sample)) for n, prompt in enumerate(PROMPTS) for sample in range(2)]


SAMPLING = (Sampling(max_tokens=12, temperature=0.0), Sampling(max_tokens=12, temperature=0.7, stop=(7,)))


UPDATES = (0, 1, 0, 2, 1)
"""Which model's weights each update brings."""


def models(folder: Path, **changes: Any) -> list[Path]:
    return [save_model(folder / str(seed), seed=seed, **changes) for seed in (1, 2, 3)]


def tensors(folder: Path) -> list[tuple[str, Tensor]]:
    """In the order of a checkpoint, layer by layer."""
    source = HuggingFaceWeights(folder)
    return [(name, source.read(name, (0, source.shape(name)[0]))) for name in sorted(source.names())]


def start_vllm(folder: Path, **arguments: Any) -> Any:
    """vLLM in this rank, which is one of its engine's."""
    vllm_fixes.prepare()
    import vllm

    vllm_fixes.keep_process_groups()
    with vllm_fixes.contained(), vllm_fixes.private_shared_memory():
        return vllm.LLM(
            str(folder),
            distributed_executor_backend="external_launcher",
            skip_tokenizer_init=True,
            max_model_len=512,
            enforce_eager=True,
            kv_cache_memory_bytes=32 << 20,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            **{"dtype": "float32", **arguments},
        )


def ask(llm: Any) -> list[Answers]:
    """Everything of an engine in this process."""
    import vllm

    answers = []
    for sampling in SAMPLING:
        parameters = [
            vllm.SamplingParams(
                seed=request.seed,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(sampling.stop),
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for request in REQUESTS
        ]
        outputs = llm.generate([{"prompt_token_ids": list(r.prompt)} for r in REQUESTS], parameters, use_tqdm=False)
        answers.append([(list(o.outputs[0].token_ids), list(o.outputs[0].logprobs.logprobs)) for o in outputs])
    return answers


def fresh(folders: list[Path], port: int, **arguments: Any) -> list[list[Answers]]:
    """What engines answer that loaded each folder from the disk."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [ask(start_vllm(folder, **arguments)) for folder in folders]


def assert_equal(got: list[Answers], want: list[Answers]) -> None:
    for some, others in zip(got, want, strict=True):
        assert [tokens for tokens, _ in some] == [tokens for tokens, _ in others]
        for (_, log_probs), (_, wanted) in zip(some, others, strict=True):
            torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(wanted), atol=2e-5, rtol=0)
