"""Fixes for bugs in the distributed optimizer of megatron-core 0.16.1 to 0.19, most of which occur with torch's own Adam (no Transformer
Engine, no apex)."""

from __future__ import annotations

import os
import pickle
import queue
from typing import Any

import torch

from megafork.compat import cpu

cpu.install()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer  # noqa: E402


class FixedDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer whose torch Adam state survives a checkpoint."""

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Upstream copies every key of Adam's state from `tensors`, which never holds `step`: KeyError."""
        main_param = self.optimizer.param_groups[self.model_param_group_index_map[model_param][0]]["params"][
            self.model_param_group_index_map[model_param][1]
        ]
        super()._set_main_param_and_optimizer_states(model_param, {"step": self.optimizer.state[main_param]["step"], **tensors})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each parameter its own `step` tensor: upstream shares one, which Adam then increments once per parameter."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].detach().clone()


def fix_optimizer_state(optimizer: Any) -> None:
    """Fix the optimizer that `get_megatron_optimizer` returned.

    Adam's state is created now, because upstream cannot save a checkpoint before the first step, with any Adam. If Transformer Engine or
    apex provides Adam, nothing else needs fixing.
    """
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        assert type(inner) is DistributedOptimizer
        if HAVE_APEX_OR_TE:
            inner.init_state_fn(inner.optimizer, inner.config)
            continue
        inner.__class__ = FixedDistributedOptimizer
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                inner.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


class _FileQueue:
    """A queue for one item in an unnamed file, written by a forked process and read by its parent; no other process can open it."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("results"), "w+b")

    def put(self, item: Any) -> None:
        self.file.write(pickle.dumps(item))
        self.file.flush()

    def get_nowait(self) -> Any:
        self.file.seek(0)
        if not (content := self.file.read()):
            raise queue.Empty
        return pickle.loads(content)


def use_file_for_results() -> None:
    """Make a checkpoint's writer process return its results through a file, new for each save and rank. Call before saving.

    Upstream starts a manager process per rank for that, which imports `__main__` again (0.4 GB) and outlives a rank that ends by
    `os._exit`; a pipe holds only 64 KB.
    """
    filesystem_async._results_queue = _FileQueue()
