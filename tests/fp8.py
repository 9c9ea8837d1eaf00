"""Models whose sizes FP8 blocks fit, scored by vLLM and by transformers with the same rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from ranks import free_port, on_ranks

from megafork.compat import vllm as vllm_fixes
from megafork.compat import vllm_fp8
from megafork.model.fp8 import BLOCK, dequantize, is_quantized, quantize
from megafork.shape import read_shape

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
"""Sizes that blocks fit."""


PROMPTS = [[(7 * n + m) % 99 for m in range(40)] for n in range(6)]


def score(folder: Path, kernel: str) -> Any:
    """Log-prob of each prompt token by vLLM, `with` megafork's kernel for FP8 blocks; or what vLLM says `without` it."""
    [scored] = on_ranks(1, _score, folder, kernel, free_port(), engines=True)
    return scored


def _score(folder: Path, kernel: str, port: int) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import vllm

    if kernel == "with":
        vllm_fp8.install()
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


def reference(folder: Path, *, fp8: bool) -> torch.Tensor:
    """Log-prob of each prompt token by transformers in bf16; with `fp8` projections see weights in blocks and inputs in groups of 128."""
    import transformers

    def rounded(module: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        groups = inputs[0].float().unflatten(-1, (-1, BLOCK))
        scale = groups.abs().amax(-1, keepdim=True) / 448
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).bfloat16()

    model, shape = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), read_shape(folder)
    for name, module in model.named_modules():
        if fp8 and is_quantized(f"{name}.weight", shape):
            module.weight.data = dequantize(*quantize(module.weight.data)).bfloat16()
            module.register_forward_pre_hook(rounded)
    tokens = torch.tensor(PROMPTS)
    with torch.no_grad():
        return model(tokens).logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
