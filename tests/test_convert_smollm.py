"""Real weights there and back: SmolLM2-135M to a Megatron checkpoint split for TP 2 and PP 2, and back.

Two ranks cannot share its nine heads, but the format is independent of the layout: TP 1 loads a checkpoint split for 2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, on_ranks
from smollm import save_smollm

from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.weights.huggingface import HuggingFaceWeights

pytestmark = pytest.mark.slow

QUESTIONS = ["What is the capital of France?", "Write the first three even numbers.", "Say hello in German."]


def _answers(folders: list[Path], port: int) -> list[list[tuple[str, list[int]]]]:
    """What each model says to the questions."""
    import vllm

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    said, engines = [], []  # an engine that is dropped would take the process groups along
    for folder in folders:
        how: dict[str, Any] = {"distributed_executor_backend": "external_launcher", "dtype": "float32", "enforce_eager": True}
        llm = vllm.LLM(str(folder), kv_cache_memory_bytes=64 << 20, max_model_len=256, max_num_seqs=4, **how)
        done = llm.chat(asked, vllm.SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        engines.append(llm)
        said.append([(out.outputs[0].text, list(out.outputs[0].token_ids)) for out in done])
    return said


def _there(source: Path, target: Path) -> float | None:
    return hf_to_megatron(source, target, tp=2, pp=2, verify=True).logit_difference


def test_there_and_back_and_the_same_text(tmp_path: Path) -> None:
    source = save_smollm(tmp_path / "smollm")
    assert on_ranks(1, _there, source, tmp_path / "megatron")[0] < 1e-3, "logits of up to 30, in fp32"
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = HuggingFaceWeights(source), HuggingFaceWeights(tmp_path / "back")
    assert before.names() == after.names()
    for name in before.names():
        rows = (0, before.shape(name)[0])
        assert torch.equal(before.read(name, rows), after.read(name, rows)) and before.dtype(name) == after.dtype(name), name
    [(first, second)] = on_ranks(1, _answers, [source, tmp_path / "back"], free_port(), engines=True)
    assert "Paris" in first[0][0]
    assert second == first
