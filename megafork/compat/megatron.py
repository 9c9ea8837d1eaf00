"""Upstream bugs of megatron-core 0.16.1 to 0.19 in the distributed optimizer, most of them when Adam is torch's own (no Transformer
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
        """Upstream gives all parameters one `step` tensor, which Adam then counts up once a parameter: each gets its own."""
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].detach().clone()


def fix_optimizer_state(optimizer: Any) -> None:
    """Mend the optimizer that `get_megatron_optimizer` returned.

    Adam's state is made at once, because a checkpoint before the first step fails upstream, whoever's Adam it is. Where Transformer
    Engine or apex brings its own, that is all.
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
    """A queue for one item, in a file without a name: written by a forked process, read by the one that forked it, open to nobody else."""

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
    """Tell what a checkpoint's writer wrote through a file, new for each save and rank. Upstream starts a manager process a rank for it,
    which imports `__main__` again (0.4 GB) and outlives a rank that ends by `os._exit`; a pipe would hold 64 KB. Call before saving."""
    filesystem_async._results_queue = _FileQueue()
