"""The two functions of `blocks.py` in Triton, for CUDA: each makes one pass over the logits.

Bytes moved per logit: forward 4 (reads fp32), backward 6 with bf16 weights (reads fp32, writes bf16), 8 with fp32 weights (in place).
The same code runs on the CPU under TRITON_INTERPRET=1, which is how it is tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megafork.parallel.blocks import LOG_ZERO, GradientTerms

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_NAN = tl.constexpr(tl.PropagateNan.ALL)  # a NaN logit must not pass for one of probability 0
_BLOCK = 4096
_WARPS = 8


def accumulate_stats(stats: Tensor, logits: Tensor, targets: Tensor, temperatures: Tensor) -> None:
    """`blocks.accumulate_stats`; the logits (fp32 or bf16, rows contiguous) are only read."""
    n, columns = logits.shape
    if n:
        _stats_kernel[(n,)](stats, stats.stride(0), logits, logits.stride(0), targets, temperatures, columns, _BLOCK, num_warps=_WARPS)


def logits_gradient(logits: Tensor, targets: Tensor, terms: GradientTerms, dtype: torch.dtype) -> Tensor:
    """`blocks.logits_gradient`; overwrites the logits if they have `dtype`, else allocates a new block."""
    n, columns = logits.shape
    gradient = logits if logits.dtype == dtype else torch.empty(n, columns, dtype=dtype, device=logits.device)
    by_entropy = terms.scale if terms.by_entropy is None else terms.by_entropy
    if n:
        _gradient_kernel[(n, triton.cdiv(columns, _BLOCK))](
            gradient,
            gradient.stride(0),
            logits,
            logits.stride(0),
            targets,
            terms.temperatures,
            terms.top,
            terms.log_total,
            terms.scale,
            terms.constant,
            by_entropy,
            columns,
            terms.by_entropy is not None,
            _BLOCK,
            num_warps=_WARPS,
        )
    return gradient


@triton.jit
def _stats_kernel(stats, stats_stride, logits, logits_stride, targets, temperatures, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row. The sums stay spread over the lanes, relative to the row's running maximum, until the end."""
    row = tl.program_id(0).to(tl.int64)
    x_row = logits + row * logits_stride
    inverse = 1.0 / tl.load(temperatures + row)
    before = tl.load(stats + row)
    top = before
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + offsets, mask=offsets < columns, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        difference = tl.maximum((top - new_top) * inverse, _LOG_ZERO, _NAN)
        decay = tl.exp(difference)
        z = tl.maximum((x - new_top) * inverse, _LOG_ZERO, _NAN)
        exp = tl.exp(z)
        weighted = (weighted + difference * total) * decay + exp * z
        total = total * decay + exp
        top = new_top

    difference = tl.maximum((before - top) * inverse, _LOG_ZERO, _NAN)
    decay = tl.exp(difference)
    total_before = tl.load(stats + stats_stride + row)
    weighted_before = tl.load(stats + 2 * stats_stride + row)
    tl.store(stats + row, top)
    tl.store(stats + stats_stride + row, total_before * decay + tl.sum(total, 0))
    tl.store(stats + 2 * stats_stride + row, (weighted_before + difference * total_before) * decay + tl.sum(weighted, 0))
    target = tl.load(targets + row)
    if (target >= 0) & (target < columns):
        tl.store(stats + 3 * stats_stride + row, tl.load(x_row + target).to(tl.float32))


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    gradient,
    gradient_stride,
    logits,
    logits_stride,
    targets,
    temperatures,
    top,
    log_total,
    scale,
    constant,
    by_entropy,
    columns,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    x = tl.load(logits + row * logits_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    log_p = (x - tl.load(top + row)) / tl.load(temperatures + row) - tl.load(log_total + row)
    log_p = tl.maximum(log_p, _LOG_ZERO, _NAN)
    factor = -tl.load(constant + row)
    if WITH_ENTROPY:
        factor -= tl.load(by_entropy + row) * log_p
    result = tl.exp(log_p) * factor
    result += tl.where(offsets == tl.load(targets + row), tl.load(scale + row), 0.0)
    tl.store(gradient + row * gradient_stride + offsets, result.to(gradient.dtype.element_ty), mask=inside)
