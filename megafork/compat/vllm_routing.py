"""The experts that an engine in this process chose for each token, where vLLM itself does not return them.

vLLM (0.32) returns them from its second model runner (`enable_return_routed_experts`), which needs a GPU. On the CPU they are kept here
beside the KV cache, one row for each of its slots. So a token has them as long as it has keys and values, whatever the scheduler does:
chunked prompts, cached prefixes, preemption, drafts that are rejected.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor


class RoutingKeeper:
    """Keeps the routing of one engine's requests until it is taken. Goes when vLLM returns it on the CPU too."""

    def __init__(self, llm: Any) -> None:
        """llm: a `vllm.LLM` in this process, of a model with experts."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        engine = llm.llm_engine
        runner = engine.model_executor.driver_worker.worker.model_runner
        config = engine.model_config
        cache = runner.kv_cache_config
        (group,) = cache.kv_cache_groups  # one for all layers: no window, no other state
        self._block = group.kv_cache_spec.block_size
        layers, chosen = config.get_total_num_hidden_layers(), config.get_num_experts_per_tok()
        self._by_slot = torch.zeros(cache.num_blocks * self._block, layers, chosen, dtype=torch.int16)
        self._finished: dict[str, Tensor] = {}
        for module in runner.get_model().modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._capture, module.layer_id))
        self._scheduler = engine.engine_core.engine_core.scheduler
        self._free = self._scheduler._free_request
        self._scheduler._free_request = self._finish

    def take(self, request: str) -> Tensor:
        """Of a finished request, by its internal name: int16 [prompt + response - 1, layers, experts of a token]; 0 in dense layers."""
        return self._finished.pop(request)

    def clear(self) -> None:
        """Forget what was not taken, as of requests that were aborted."""
        self._finished.clear()

    def _capture(self, layer: int, chosen: Tensor) -> None:
        from vllm.forward_context import get_forward_context

        by_layer = get_forward_context().slot_mapping
        if not isinstance(by_layer, dict) or not by_layer:
            return  # a trial run when the engine starts
        slots = next(iter(by_layer.values()))[: len(chosen)]
        held = slots >= 0
        self._by_slot[slots[held], layer] = chosen[held].to(torch.int16)

    def _finish(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs while the request still has its blocks."""
        (blocks,) = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        slots = (torch.tensor(blocks, dtype=torch.int64)[:, None] * self._block + torch.arange(self._block)).flatten()
        self._finished[request.request_id] = self._by_slot[slots[: request.num_tokens - 1]]
        return self._free(request, *args, **kwargs)
