"""Log-prob and entropy of a vocabulary-parallel head, without ever materialising all logits.

The logits [N, V/TP] are computed, used and dropped one block at a time, in the forward and again in the backward. With x the logits of
a token, m their maximum, z = (x - m) / T, S = sum_j exp(z_j) and p_j = exp(z_j) / S:

    log_prob = z_target - log S                        d log_prob / d x_j = ([j = target] - p_j) / T
    entropy  = log S - sum_j z_j exp(z_j) / S          d entropy  / d x_j = -p_j (log p_j + entropy) / T

Each rank sums over its own columns relative to its own maximum; one MAX and one packed SUM all-reduce, of N and 3 N floats, combine the
shards. Only [N] vectors are kept for the backward, which recomputes each block and overwrites it with its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megafork.parallel import blocks
from megafork.parallel.blocks import LOWEST, GradientTerms, shift_stats

DEFAULT_MEMORY_MB = 256
_CPU_BLOCK = 1 << 19  # elements: 2 MiB, which fits in a core's cache
_CPU_ROWS = 1024  # with 512 columns: a narrower block halves the speed of its four matrix products
_MOST_ROWS = 4096  # per block; the all-reduce of one row of blocks overlaps the next
_FEWEST_COLUMNS = 256
_ALIGNMENT = 128  # columns, so that GPU loads stay vectorised


def chunk_for(memory_mb: int, vocab_per_rank: int) -> int:
    """Tokens whose fp32 logits [chunk, V/TP] fill `memory_mb` MiB (recipe key `loss.head_memory_mb`); at least 1."""
    return max(1, memory_mb * 2**20 // (4 * vocab_per_rank))


def log_prob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    entropy_grad: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each position under softmax(hidden @ weight.T / temperature).

    hidden: [N, H] fp32 or bf16, the same on every rank of `group`. weight: [V/TP, H], rank r holds rows r V/TP to (r + 1) V/TP of
    the padded vocabulary. targets: [N] int64 global token ids, the same on every rank; one outside [0, vocab_size) gives NaN.
    temperature: above 0, one number or fp32 [N]. vocab_size: the real size; columns beyond it have probability exactly 0.
    group: the tensor parallel group, None for one rank. entropy_grad: whether the entropy is differentiable.
    chunk: extra memory is at most one fp32 [chunk, V/TP] plus O(N) (see `chunk_for`); unset: 256 MiB.

    Returns (log_prob [N], entropy [N] >= 0) in fp32 nats, the same on every rank. Logits, sums and gradients are fp32 whatever the
    inputs are; where CUDA multiplies bf16, the logits' gradient is rounded to bf16 before the two products of the backward.

    Collective: every rank of the group must call forward and backward together; two all-reduces in the forward, one per thousand
    tokens or more in the backward. The gradient of `hidden` is complete (summed over the group) on every rank. The gradient of
    `weight` goes straight into `weight.main_grad` if Megatron's DDP keeps one in fp32; autograd then carries a zero gradient that takes
    no memory, so that hooks fire and the gradient of a tied embedding is added as usual.
    """
    n = len(targets)
    if hidden.shape != (n, weight.shape[1]) or targets.shape != (n,) or targets.dtype != torch.int64:
        raise ValueError(
            f"head: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {targets.dtype} {tuple(targets.shape)} "
            "do not fit: give [N, H], [V/TP, H] and int64 [N]"
        )
    if isinstance(temperature, Tensor):
        if temperature.shape != (n,):
            raise ValueError(f"head: temperature {tuple(temperature.shape)} does not fit: give one number or [{n}]")
        temperatures = temperature.detach().float()
    elif temperature > 0:
        temperatures = torch.full((n,), float(temperature), dtype=torch.float32, device=hidden.device)
    else:
        raise ValueError(f"head: temperature is {temperature}: give a number above 0")
    shard = _Shard.of(weight, vocab_size, group)
    rows, columns = _block_shape(n, len(weight), chunk or chunk_for(DEFAULT_MEMORY_MB, len(weight)), hidden.device.type)
    return _Head.apply(hidden, weight, targets, temperatures, shard, rows, columns, entropy_grad)


def gather_rows(local_hidden: Tensor, positions: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather rows `positions` of a sequence that is split over `group` (sequence parallel) to every rank.

    local_hidden: [S/TP, H], this rank's rows. positions: [P] int64 in [0, S), the same on every rank, in any order; P may be 0.
    Returns [P, H] in the order of `positions`. Only these rows are sent: one all-gather, padded to the most rows that any rank holds.
    The backward communicates nothing: it assumes a gradient that is complete on every rank, as `log_prob_and_entropy` makes it.
    Collective: every rank of the group must call the forward, with the same positions.
    """
    if group is None or group.size() == 1:
        return local_hidden[positions]
    return _GatherRows.apply(local_hidden, positions, group)


@dataclass(frozen=True)
class _Shard:
    """This rank's real columns: `width` of them, the first being token `start`."""

    start: int
    width: int
    vocab_size: int
    group: dist.ProcessGroup | None

    @staticmethod
    def of(weight: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> _Shard:
        size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        if not 0 < vocab_size <= size * len(weight):
            raise ValueError(f"head: vocab_size is {vocab_size} but the {size} shards hold {size * len(weight)} rows: give the real size")
        start = rank * len(weight)
        return _Shard(start, min(max(vocab_size - start, 0), len(weight)), vocab_size, group if size > 1 else None)


def _block_shape(n: int, vocab_per_rank: int, chunk: int, device: str) -> tuple[int, int]:
    """Rows and columns of a block, the same on every rank. A block and its one temporary together fit in [chunk, V/TP]."""
    elements, most_rows = chunk * vocab_per_rank // 2, _MOST_ROWS
    if device == "cpu":
        elements, most_rows = min(elements, _CPU_BLOCK), _CPU_ROWS
    fewest = min(vocab_per_rank, _FEWEST_COLUMNS)
    rows = max(1, min(n, most_rows, elements // fewest))
    columns = max(fewest, min(vocab_per_rank, elements // rows))
    return rows, columns - columns % _ALIGNMENT if columns > _ALIGNMENT else columns


def _implementation(device: torch.device) -> ModuleType:
    """The Triton kernels if they can run, else plain PyTorch; both have `accumulate_stats` and `logits_gradient`."""
    if device.type == "cuda" and find_spec("triton"):
        from megafork.parallel import kernels  # imports triton, which is not installed everywhere

        return kernels
    return blocks


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperatures: Tensor,
        shard: _Shard,
        rows: int,
        columns: int,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        stats = torch.zeros(4, len(targets), dtype=torch.float32, device=hidden.device)
        stats[0] = LOWEST
        implementation = _implementation(hidden.device)
        for row in _slices(len(targets), rows):
            for column in _slices(shard.width, columns):
                logits = _product(hidden[row], weight[column].t())
                implementation.accumulate_stats(stats[:, row], logits, targets[row] - (shard.start + column.start), temperatures[row])
        _join_shards(stats, temperatures, shard.group)
        top, total, weighted, target = stats
        log_total = total.log()
        known = (targets >= 0) & (targets < shard.vocab_size)
        log_prob = torch.where(known, (target - top) / temperatures - log_total, torch.nan)
        entropy = (log_total - weighted / total).clamp_(min=0.0)

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, temperatures, top, log_total, entropy)
        ctx.shard, ctx.rows, ctx.columns = shard, rows, columns
        main_grad = getattr(weight, "main_grad", None)
        ctx.main_grad = main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, temperatures, top, log_total, entropy = ctx.saved_tensors
        shard: _Shard = ctx.shard
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        terms = GradientTerms.of(temperatures, top, log_total, entropy, grad_log_prob, grad_entropy)
        factor_dtype = weight.dtype if weight.is_cuda else torch.float32
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = None
        if for_weight:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.main_grad is None else ctx.main_grad

        implementation = _implementation(hidden.device)
        reduction = _RowReduction(grad_hidden, shard.group)
        for row in _slices(len(targets), ctx.rows):
            partial = torch.zeros_like(hidden[row], dtype=torch.float32)
            for column in _slices(shard.width, ctx.columns):
                logits = _product(hidden[row], weight[column].t())
                gradient = implementation.logits_gradient(
                    logits, targets[row] - (shard.start + column.start), terms.of_rows(row), factor_dtype
                )
                del logits
                if for_hidden:
                    _product(gradient, weight[column], add_to=partial)
                if grad_weight is not None:
                    _product(gradient.t(), hidden[row], add_to=grad_weight[column])
                del gradient  # before the next block is made
            if for_hidden:
                reduction.start(row, partial)
        reduction.finish()
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype) if ctx.main_grad is None else _no_gradient(weight)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _join_shards(stats: Tensor, temperatures: Tensor, group: dist.ProcessGroup | None) -> None:
    """Combine the stats of the shards' columns into those of whole rows, in place. Two all-reduces."""
    if group is None or stats.shape[1] == 0:
        return
    top = stats[0].clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    shift_stats(stats, top, temperatures)
    dist.all_reduce(stats[1:], dist.ReduceOp.SUM, group=group)


def _product(a: Tensor, b: Tensor, add_to: Tensor | None = None) -> Tensor:
    """a @ b in fp32, added to `add_to` (in place) if given. bf16 factors stay bf16 on CUDA, whose matmul accumulates in fp32."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        if add_to is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(add_to, a, b, out_dtype=torch.float32, out=add_to)
    a, b = a.float(), b.float()
    return torch.mm(a, b) if add_to is None else add_to.addmm_(a, b)


def _no_gradient(weight: Tensor) -> Tensor:
    """A zero gradient of the weight's shape that takes no memory, not even when autograd or a hook adds it to another gradient."""
    indices = torch.empty(2, 0, dtype=torch.int64, device=weight.device)
    values = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=False)


class _RowReduction:
    """Sums [rows, H] gradients over the group into `result`, in its dtype, while the next rows are computed."""

    def __init__(self, result: Tensor | None, group: dist.ProcessGroup | None) -> None:
        self._result, self._group = result, group
        self._pending: tuple[slice, Tensor, Any] | None = None

    def start(self, row: slice, partial: Tensor) -> None:
        self.finish()
        work = dist.all_reduce(partial, group=self._group, async_op=True) if self._group is not None else None
        self._pending = (row, partial, work)

    def finish(self) -> None:
        if self._pending is None:
            return
        row, partial, work = self._pending
        if work is not None:
            work.wait()
        assert self._result is not None
        self._result[row] = partial
        self._pending = None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_hidden: Tensor, positions: Tensor, group: dist.ProcessGroup) -> Tensor:
        length, width = local_hidden.shape
        owner = positions.div(length, rounding_mode="floor")
        order = owner.argsort(stable=True)
        counts = torch.bincount(owner, minlength=group.size())
        first = counts.cumsum(0) - counts
        counts_here = counts.tolist()
        start = sum(counts_here[: group.rank()])
        mine = order[start : start + counts_here[group.rank()]]
        ctx.shape, ctx.dtype = local_hidden.shape, local_hidden.dtype
        local = positions[mine] - group.rank() * length
        ctx.save_for_backward(mine, local)
        most = max(counts_here)
        if most == 0:
            return local_hidden.new_empty(0, width)
        sent = local_hidden.new_zeros(most, width)
        torch.index_select(local_hidden, 0, local, out=sent[: len(local)])
        received = local_hidden.new_empty(group.size() * most, width)
        dist.all_gather_into_tensor(received, sent, group=group)
        slot = torch.empty_like(order)
        slot[order] = owner[order] * most + torch.arange(len(order), device=order.device) - first[owner[order]]
        return received[slot]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        mine, local = ctx.saved_tensors
        grad_hidden = torch.zeros(ctx.shape, dtype=ctx.dtype, device=gradient.device)
        return grad_hidden.index_add_(0, local, gradient[mine]), None, None
