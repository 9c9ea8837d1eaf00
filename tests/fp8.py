"""Models whose sizes FP8 blocks fit, scored by vLLM and by transformers with the same rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megafork.model.fp8 import BLOCK, dequantize, is_quantized, quantize
from megafork.shape import read_shape

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
"""Sizes that blocks fit."""


_SCORE = """
import json, sys
from megafork.compat import vllm as fixes, vllm_fp8
fixes.prepare()
import torch, vllm
def engine():
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, "max_model_len": 64, "max_num_seqs": 8}
    return vllm.LLM(sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", **small)
if sys.argv[2] == "without":
    try:
        engine()
    except Exception as error:
        print(json.dumps(str(error)))
        raise SystemExit
vllm_fp8.install()
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[3])]
done = engine().generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
print(json.dumps([[list(place.values())[0].logprob for place in out.prompt_logprobs[1:]] for out in done]))
"""


PROMPTS = [[(7 * n + m) % 99 for m in range(40)] for n in range(6)]


def score(folder: Path, kernel: str) -> Any:
    command = [sys.executable, "-c", _SCORE, str(folder), kernel, json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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
