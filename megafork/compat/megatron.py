"""Fixes for bugs in the distributed optimizer of megatron-core 0.16.1 to 0.19, most of which occur with torch's own Adam (no Transformer
Engine, no apex), and for places where the host waits for the GPU unnecessarily."""

from __future__ import annotations

import os
import pickle
import queue
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megafork.compat import cpu

cpu.install()

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer  # noqa: E402
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.utils import local_multi_tensor_l2_norm  # noqa: E402


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


def _l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
    norm = torch.nn.utils.get_total_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return norm.float().reshape(1), None


def keep_norms_on_device() -> None:
    """Compute gradient norms without waiting for the GPU. Without Transformer Engine or apex, upstream reads the norm of each parameter's
    gradient on the host, and so waits once per parameter, twice per update."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _communicate_shapes(
    self: Any, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
) -> tuple[list[int], list[int]]:
    operations, received = [], []
    for sent, receives, peer in ((tensor_send_prev, recv_prev, self.prev_rank), (tensor_send_next, recv_next, self.next_rank)):
        shape = torch.zeros(3, dtype=torch.int64)
        if sent is not None:
            operations.append(dist.P2POp(dist.isend, torch.tensor(sent.size()), peer, self.pp_group))
        if receives:
            operations.append(dist.P2POp(dist.irecv, shape, peer, self.pp_group))
        received.append(shape)
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return received[0].tolist(), received[1].tolist()


def exchange_shapes_on_host() -> None:
    """Exchange the shapes of tensors sent between pipeline stages (micro-batches differ in length) over gloo, which the groups also have.
    Upstream sends shapes from GPU to GPU and waits three times for each: to create the tensor, after the exchange, and to read it."""
    P2PCommunicator._communicate_shapes = _communicate_shapes


class _FileQueue:
    """A queue for one item in an unnamed file, written by a forked process and read by its parent; no other process can open it."""

    def __init__(self) -> None:
        self.file = os.fdopen(os.memfd_create("results"), "w+b")

    def put(self, item: Any) -> None:
        self.file.write(pickle.dumps(item))
        self.file.flush()

    def get_nowait(self) -> Any:
        """An exception, as upstream's for a failed writer, if nothing was written."""
        self.file.seek(0)
        if not (content := self.file.read()):
            return RuntimeError("the process that was writing this rank's files was killed; has the machine run out of memory?")
        return pickle.loads(content)


def _write_in_threads(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: _FileQueue) -> None:
    write = partial(filesystem_async.FileSystemWriterAsync.write_preloaded_data, transforms, use_fsync=True, use_msc=use_msc)
    written: queue.SimpleQueue[tuple[int, list[Any] | Exception]] = queue.SimpleQueue()
    counted: queue.Queue[int] = queue.Queue()
    torch.set_num_threads(torch.get_num_threads())  # in a fork, replaces torch's thread pool, which two threads must not do at once
    with ThreadPoolExecutor(max(len(buckets), 1)) as pool:
        for number in range(len(buckets)):
            counted.put(number)
        for done in [pool.submit(write, number, bucket, written, counted) for number, bucket in enumerate(buckets)]:
            done.result()
    found = dict(written.get_nowait() for _ in buckets)
    errors = [part for part in found.values() if isinstance(part, Exception)]
    results.put(errors[0] if errors else found)


def write_checkpoints_in_one_process() -> None:
    """Write a rank's files of a checkpoint in threads, and return the results through a file, new for each save and rank. Call before
    saving.

    Upstream forks a process per file and waits forever for one that is killed, as by a lack of memory. For the results it starts a manager
    process per rank, which imports `__main__` again (0.4 GB) and outlives a rank that ends by `os._exit`; a pipe holds only 64 KB.
    """
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    filesystem_async._results_queue = _FileQueue()
