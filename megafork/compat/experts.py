"""Fixes for the mixture-of-experts layers of megatron-core 0.16.1 where Transformer Engine or CUDA is absent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.compat import cpu

cpu.install()

from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402

_move_to_host = token_dispatcher.maybe_move_tensor_to_cpu
_gather_rows = mappings._gather_along_first_dim


def run_without_transformer_engine() -> None:
    """Let the router run without Transformer Engine: it asks whether `te_general_gemm` is None, but the name is only defined if Transformer
    Engine can be imported. Goes when `moe_utils` defines it in either case."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
        return tensor.numpy()
    return _move_to_host(tensor, as_numpy, record_stream)


def read_splits_on_host() -> None:
    """Give the all-to-all of tokens its split sizes as numbers. Upstream turns only tensors on a GPU into numpy arrays; those on the CPU
    stay tensors, which `all_to_all_single` refuses. Goes when `maybe_move_tensor_to_cpu` converts both."""
    token_dispatcher.maybe_move_tensor_to_cpu = _splits


def _gather(
    tensor: Tensor, group: dist.ProcessGroup, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    if output_split_sizes is None or tensor.is_cuda or group.size() == 1:
        return _gather_rows(tensor, group, output_split_sizes, use_global_buffer)
    gathered = tensor.new_empty(sum(output_split_sizes), *tensor.shape[1:])
    copies = tensor.repeat(group.size(), *[1] * (tensor.dim() - 1))
    dist.all_to_all_single(gathered, copies, output_split_sizes, [len(tensor)] * group.size(), group=group)
    return gathered


def gather_uneven_rows() -> None:
    """Gather the tokens of an expert's tensor-parallel ranks, which differ in number, over gloo by an all-to-all: gloo's own gather needs
    equally many from each rank. Goes when gloo's does not."""
    mappings._gather_along_first_dim = _gather


def wait_for_no_stream() -> None:
    """Let the dispatcher copy its counts to the host without CUDA. It makes its stream from `torch.cuda.Stream`, which vLLM's worker for
    the CPU (0.32) replaces, when it is imported, by one whose `record_event` returns None. Goes when that returns an event."""
    if not torch.cuda.is_available():
        token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = cpu.Stream()
