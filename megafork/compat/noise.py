"""Silences third-party warnings that a user can do nothing about. Imports nothing heavy: some must be silenced before torch is imported.

Each is matched by its text and by the module that raises it, so that new warnings, and the same ones from elsewhere, still show.
`tests/test_compat.py` fails when the libraries no longer raise one of them: then delete its line.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings

from megafork.files import full_disk

WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    # megatron-core 0.16.1: about its own default for CUDA graphs, which megafork does not use
    (UserWarning, r"full scope is deprecated", r"megatron\.core\.transformer\.transformer_config"),
    # megatron-core 0.16.1 on torch 2.13: collectives that torch has renamed
    (
        FutureWarning,
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
        r"torch\.distributed\.c10d_logger",
    ),
    # megatron-core 0.16.1: the distributed optimizer clears .grad of views, which have none
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core\.optimizer\.optimizer"),
    # megatron-core 0.16.1 on torch 2.13: how it loads a checkpoint
    (FutureWarning, r"`load_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\.strategies\.torch"),
    (FutureWarning, r"Please use DTensor instead", r"torch\.distributed\.checkpoint\.(planner_helpers|default_planner)"),
    # vLLM 0.32: inspects every attribute of every module once
    (FutureWarning, r"`torch\.distributed\.reduce_op` is deprecated", r"vllm\.triton_utils\.dispatcher"),
)
LOGGERS = (
    "vllm.triton_utils.importing",  # reports that Triton has no CPU backend, before vLLM has set its own log level
    "megatron.core.dist_checkpointing.strategies.filesystem_async",  # reports why a checkpoint can't be written, which is also raised
)


def silence() -> None:
    """Silence the warnings. Call at the start of a command, before torch is imported. Idempotent; the user's environment wins."""
    # C++ warnings: vLLM warns that it binds memory to the only NUMA node. Errors still show.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category, message, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_error)
    threading.excepthook = _report_thread_failure


def _report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Hide the traceback of TensorBoard's writer thread when the disk is full: the error is raised again in its caller."""
    if full_disk(failure.exc_value) is None:
        threading.__excepthook__(failure)


def _is_error(record: logging.LogRecord) -> bool:
    """A log filter: setting a level would not last, as the libraries set these loggers' levels themselves."""
    return record.levelno > logging.ERROR
