"""Verifies a conversion: reads every tensor back, and compares the logits of transformers and Megatron."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from safetensors import safe_open
from torch import Tensor

from megafork.convert.sources import Source
from megafork.joined import loopback
from megafork.model import fp8
from megafork.model.attention import PackedSequences
from megafork.model.build import PolicyConfig, build_policy
from megafork.model.policy import HeadRequest, Policy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Parallel, Precision
from megafork.shape import Shape
from megafork.weights.checkpoint import load_weights

TOLERANCE = 1e-4
"""Tolerance for logits, relative to the largest. A different order of summation causes 1e-6, a misplaced tensor 1."""
_TOKENS = 32


class VerifyError(RuntimeError):
    """The output differs from the input: a fault of this program or of the disk, not of the input."""


def compare_tensors(source: Source, written: Source, tick: Callable[[int], None]) -> None:
    """Compare every tensor of `written` bit by bit with that of `source` in its dtype. Raises VerifyError naming those that differ."""
    wrong = []
    for (name, wanted), (also, found) in zip(source.read(), written.read(), strict=True):
        assert name == also
        if not torch.equal(_bits(wanted.to(found.dtype)), _bits(found)):
            wrong.append(name)
        tick(found.nbytes)
    if wrong:
        raise VerifyError(f"--verify: {', '.join(wrong)}: differ from the source when read back; nothing was kept")


def compare_blocks(source: Source, folder: Path, tick: Callable[[int], None]) -> None:
    """Compare every tensor of the FP8 folder with that of `source`: exactly or, if quantised, to half a unit in e4m3's last place."""
    wrong = []
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    for name, wanted in source.read():
        found = _tensor(files[name], name)
        if fp8.is_quantized(name, source.shape):
            scale = _tensor(files[name + fp8.SCALE], name + fp8.SCALE)
            allowed = wanted.float().abs() / 16 + fp8.dequantize(torch.ones_like(wanted), scale) * 2**-10
            fits = bool(((fp8.dequantize(found, scale) - wanted.float()).abs() <= 1.001 * allowed).all())
        else:
            fits = torch.equal(_bits(wanted.to(found.dtype)), _bits(found))
        if not fits:
            wrong.append(name)
        tick(found.nbytes)
    if wrong:
        raise VerifyError(f"--verify: {', '.join(wrong)}: differ from the source's weights in FP8; nothing was kept")


def compare_logits(huggingface: Path, megatron: Path, shape: Shape, dtype: torch.dtype) -> float:
    """Largest difference between the logits of transformers and of Megatron, both in fp32 from weights rounded to `dtype`.

    Creates a temporary process group unless the caller is alone in one. Raises VerifyError beyond the tolerance.
    """
    tokens = torch.arange(_TOKENS) * 7919 % shape.vocab
    wanted = _transformers_logits(huggingface, tokens, dtype)
    found = _megatron_logits(megatron, shape, tokens, dtype)
    difference = float((wanted - found).abs().max())
    if not difference <= TOLERANCE * float(wanted.abs().max()):
        raise VerifyError(
            f"--verify: the logits of Megatron and transformers differ by {difference:.2g} (largest: {float(wanted.abs().max()):.2g}); "
            "nothing was kept"
        )
    return difference


def _transformers_logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of transformers, [tokens, vocabulary] fp32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    _round(model, dtype)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def _megatron_logits(checkpoint: Path, shape: Shape, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of the policy used in training, loaded by megatron-core, [tokens, vocabulary] fp32."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with _alone(), warnings.catch_warnings(category=FutureWarning):
        warnings.simplefilter("ignore", FutureWarning)  # megatron-core 0.16 loads by functions deprecated in torch 2.13
        mesh = build_mesh(Parallel(), seed=1, device=device)
        [policy] = build_policy(shape, PolicyConfig(Precision(dtype="fp32")), mesh)
        load_weights(checkpoint, [policy], mesh)
        _round(policy, dtype)
        return _logits(policy, tokens.to(device), shape.vocab).cpu()


def _logits(policy: Policy, tokens: Tensor, vocab: int) -> Tensor:
    """Logits from the head's input, as the policy's own head never returns them."""
    hidden: list[Tensor] = []
    hook = policy.decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    request = HeadRequest(torch.zeros(1, dtype=torch.int64, device=tokens.device), tokens[:1], torch.ones(1, device=tokens.device))
    with torch.no_grad():
        packing = PackedSequences.of([len(tokens)], tokens.device)
        policy(tokens[None], None, None, labels=request, packed_seq_params=packing)
        hook.remove()
        weight: Any = (
            policy.shared_embedding_or_output_weight() if policy.share_embeddings_and_output_weights else policy.output_layer.weight
        )
        return hidden[0].squeeze(1) @ weight[:vocab].T


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


@contextmanager
def _alone() -> Iterator[None]:
    """Provide a process group of this process only."""
    if dist.is_initialized():
        assert dist.get_world_size() == 1, "a conversion is verified by one process"
        yield
        return
    os.environ.update(loopback(reaches_out=False))  # gloo listens even if no other process will connect
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, which compare bit by bit, even NaN."""
    return tensor.contiguous().view(torch.uint8)


def _names(file: Path) -> list[str]:
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(str(file), framework="pt") as opened:
        return opened.get_tensor(name)
