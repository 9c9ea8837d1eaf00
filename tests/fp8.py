"""Models whose sizes FP8 blocks fit, scored by vLLM and by transformers with the same rounding."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ranks import free_port, on_ranks

from megafork.compat import vllm as vllm_fixes
from megafork.compat import vllm_fp8
from megafork.model.fp8 import BLOCK, dequantize, is_quantized, quantize
from megafork.shape import read_shape

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
"""Sizes that blocks fit."""
EXPERTS: dict[str, Any] = {**WIDE, "moe_intermediate_size": 256, "tie_word_embeddings": False}
"""Sizes of a mixture that blocks fit, on two ranks too."""


PROMPTS = [[(7 * n + m) % 99 for m in range(40)] for n in range(6)]


def score(folder: Path, kernel: str) -> Any:
    """Log-prob of each prompt token by vLLM, `with` megafork's kernels for FP8 blocks; or what vLLM says `without` them, or with that for
    `linears` only."""
    [scored] = on_ranks(1, _score, folder, kernel, free_port(), engines=True)
    return scored


def _score(folder: Path, kernel: str, port: int) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import vllm

    if kernel != "without":
        vllm_fp8.install()
    if kernel == "linears":
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import select_fp8_moe_backend
        from vllm.model_executor.layers.quantization import fp8

        fp8.select_fp8_moe_backend = select_fp8_moe_backend
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, "max_model_len": 64, "max_num_seqs": 8}
    here = {"distributed_executor_backend": "external_launcher", "skip_tokenizer_init": True}
    vllm_fixes.keep_process_groups()
    with vllm_fixes.contained(), vllm_fixes.private_shared_memory():
        try:
            llm = vllm.LLM(str(folder), dtype="bfloat16", **small, **here)
        except ValueError as error:
            if kernel == "with":
                raise
            return str(error)
    how = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    done = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], how, use_tqdm=False)
    return [[next(iter(place.values())).logprob for place in out.prompt_logprobs[1:]] for out in done]


def reference(folder: Path, *, fp8: bool, sequences: list[list[int]] = PROMPTS) -> list[torch.Tensor]:
    """Log-probs of each sequence's tokens after the first by transformers in bf16; with `fp8` projections see weights in blocks and inputs
    in groups of 128."""
    import transformers

    model, shape = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), read_shape(folder)
    for name, module in model.named_modules():
        if fp8 and is_quantized(f"{name}.weight", shape):
            module.weight.data = dequantize(*quantize(module.weight.data)).bfloat16()
            module.register_forward_pre_hook(lambda _, inputs: _rounded(inputs[0]))
        if fp8 and name.endswith(".experts"):
            module.forward = _experts(module)
    with torch.no_grad():
        logits = [model(torch.tensor([tokens])).logits[0, :-1].float() for tokens in sequences]
    return [one.log_softmax(-1).gather(-1, torch.tensor(tokens)[1:, None])[:, 0] for one, tokens in zip(logits, sequences, strict=True)]


def _experts(module: Any) -> Callable[..., torch.Tensor]:
    """The forward of transformers' experts, each of whose projections sees weights in blocks and inputs in groups."""
    projections = [(*gate_up.chunk(2), down) for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True)]
    weights = [[dequantize(*quantize(weight)).bfloat16() for weight in each] for each in projections]

    def forward(tokens: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(tokens, dtype=torch.float32)
        for expert, (gate, up, down) in enumerate(weights):
            inner = F.silu(F.linear(_rounded(tokens), gate)) * F.linear(_rounded(tokens), up)
            total += F.linear(_rounded(inner), down) * (shares * (chosen == expert)).sum(-1, keepdim=True)
        return total.bfloat16()

    return forward


def _rounded(inputs: torch.Tensor) -> torch.Tensor:
    groups = inputs.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).bfloat16()
