"""Fixes for the mixture-of-experts layers of megatron-core 0.16.1 where Transformer Engine or CUDA is absent."""

from __future__ import annotations

from typing import Any

import torch

from megafork.compat import cpu

cpu.install()

from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402

_move_to_host = token_dispatcher.maybe_move_tensor_to_cpu


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
