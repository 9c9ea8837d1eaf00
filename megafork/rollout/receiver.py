"""The worker side of weight updates in a vLLM server: the state of an update and, without CUDA, the transfer over gloo. Importing it also
makes the worker's sampler return entropies to requests that ask for them.

`--worker-extension-cls megafork.rollout.receiver.Receiver` makes vLLM import this module in every worker before the model is loaded;
`--weight-transfer-config '{"backend": "gloo"}'` selects the engine. The trainer's end is `transfer.GlooLink`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Store, TCPStore
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from megafork.compat import vllm as vllm_fixes
from megafork.compat import vllm_entropy, vllm_fp8
from megafork.parallel.meeting import signed
from megafork.rollout.transfer import address_towards, broadcast, gloo_group


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The trainer's address (member 0), the number of members in the group, and how long each member waits for the others."""

    address: str
    port: int
    world_size: int
    limit_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors that follow, in order: Hugging Face names, dtypes, and full shapes."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives whole tensors in buckets and loads this worker's part of them.

    It raises nothing: an exception in one worker leaves the other workers' replies unread, and vLLM (0.32) would mistake each of them for
    the reply to the next call. Errors are reported by `problem`.
    """

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: Any = None
    _store: Store | None = None
    _problem: str | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.shutdown()
        with self._noting_problems():
            limit = timedelta(seconds=init_info.limit_s)
            self._store = signed(TCPStore(init_info.address, init_info.port, init_info.world_size, timeout=limit))
            here = address_towards(init_info.address, init_info.port)
            rank = 1 + self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
            self._group = gloo_group(self._store, rank, init_info.world_size, here, init_info.limit_s)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._problem = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load one bucket. Joins the broadcast even if an earlier bucket failed to load, so that no member waits."""
        with self._noting_problems():
            # fresh tensors each time: vLLM keeps them until a module is complete
            tensors = [
                torch.empty(shape, dtype=getattr(torch, dtype))
                for dtype, shape in zip(update_info.dtype_names, update_info.shapes, strict=True)
            ]
            broadcast(self._group, tensors)
            if self._problem is None:
                self.model.load_weights(zip(update_info.names, tensors, strict=True))

    def finish_weight_update(self) -> None:
        """Finish the update. After a problem, layers with incomplete weights keep their old ones until the next update fixes them."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        if self.problem() is not None:
            for layer in self.model.modules():  # vLLM would now load the weights it holds, and fail again
                info = get_layerwise_info(layer)
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)
        vllm_fixes.finish_tied_heads(self.model)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def problem(self) -> str | None:
        """The first problem since the update started, including, until it is finished, linear layers and experts that lack weights.

        vLLM would leave a layer that received only some of its weights partly undefined. (Embedding and head always wait for more
        weights: the rows that pad the vocabulary.)
        """
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, LinearBase | RoutedExperts)]
        missing = [name for name, layer in layers if get_layerwise_info(layer).can_load()]
        return self._problem or (f"not all weights were sent of {', '.join(missing)}" if missing else None)

    @contextlib.contextmanager
    def _noting_problems(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - see the class
            self._problem = self._problem or f"{type(error).__name__}: {error}"


class Receiver:
    """Mixed into vLLM's worker class: methods that the trainer calls on every worker through `/collective_rpc`."""

    weight_transfer_engine: WeightTransferEngine
    _weight_update_active: bool

    def weight_update_state(self) -> dict[str, Any]:
        """Whether an update is open, and its problem, if any."""
        engine = self.weight_transfer_engine
        problem = engine.problem() if isinstance(engine, GlooWeightTransferEngine) else None
        return {"open": self._weight_update_active, "problem": problem}


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
vllm_fixes.mend_engine()
vllm_entropy.install()
if not torch.cuda.is_available():
    vllm_fp8.install()  # before the model is loaded, which may be in FP8
