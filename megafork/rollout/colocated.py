"""vLLM inside the training ranks: each engine spans `rollout.tp` ranks, and the engines fill the world. Weights arrive as tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megafork.compat import vllm as vllm_fixes
from megafork.compat import vllm_entropy, vllm_fp8
from megafork.compat.vllm_routing import RoutingKeeper
from megafork.parallel.mesh import Mesh
from megafork.recipe import RecipeError
from megafork.recipe.kinds import shown
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Ended, Engine, Memory, Request, Sampling, Weights
from megafork.rollout.vllm_arguments import engine_arguments, sampling_arguments
from megafork.shape import check_engines


class ColocatedEngine(Engine):
    """A vLLM engine in the trainer's own process. Its weights are undefined until the first `refit`."""

    def __init__(self, config: EngineConfig, mesh: Mesh, weights: Weights, cost: Callable[[], dict[str, float]] = dict) -> None:
        """`weights`: only the part of each tensor that this rank's vLLM loads needs to be defined. `cost`: returns the metrics of their
        last pass, for `refit_metrics`."""
        check_engines(config.tp, mesh.world)
        vllm_fixes.prepare()
        import vllm

        vllm_fixes.keep_process_groups()
        if config.fp8 and mesh.device.type != "cuda":
            vllm_fp8.install()
        if config.entropies:
            vllm_entropy.install()
        self.rank = mesh.rank % config.tp
        self.number = mesh.rank // config.tp
        self.engines = mesh.world // config.tp
        self._fork_decoding = config.fork_decoding
        self._entropies = config.entropies
        self._weights = config.loaded(weights)
        self._cost = cost
        with vllm_fixes.contained(), vllm_fixes.private_shared_memory():
            vllm_fixes.mend_engine()  # its imports set variables as well
            try:
                self._llm = vllm.LLM(**self._arguments(config, mesh))
            except (ValueError, TypeError) as error:  # pydantic's are ValueErrors
                if (refusal := _refusal(config, error)) is None:
                    raise
                raise refusal from error
        self._routing = RoutingKeeper(self._llm) if config.routing and mesh.device.type != "cuda" else None

    def _arguments(self, config: EngineConfig, mesh: Mesh) -> dict[str, Any]:
        on_gpu = mesh.device.type == "cuda"
        own = {"distributed_executor_backend": "external_launcher", "enable_sleep_mode": on_gpu}
        own["enable_return_routed_experts"] = config.routing and on_gpu
        return engine_arguments(config, on_gpu=on_gpu) | own

    def generate(self, requests: Sequence[Request], sampling: Sampling, ended: Ended | None = None) -> list[Completion]:
        answers: dict[int, Completion] = {}
        for place, completion in self.stream(requests, sampling):
            answers[place] = completion
            if ended is not None:
                ended(place, completion)
        return [answers[place] for place in range(len(requests))]

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Generator[tuple[int, Completion], None, None]:
        """Yield (index of the request, completion) as each completion ends. Closing the iterator early aborts the rest."""
        if not requests:
            return
        prompts: list[Any] = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        names = self._llm.enqueue(prompts, [self._parameters(request, sampling) for request in requests], use_tqdm=False)
        places = {name.partition("-")[0]: place for place, name in enumerate(names)}  # outputs lack the name's random suffix
        engine = self._llm.llm_engine

        def state() -> str:
            drawn = sum(one.detokenizer.num_output_tokens() for one in engine.output_processor.request_states.values())
            return f"{len(places):,} responses to finish, {drawn:,} tokens of them drawn"

        try:
            while engine.has_unfinished_requests():
                self.progress(state)
                for output in engine.step():
                    if output.finished:
                        place = places.pop(output.request_id)
                        routing = self._routing.take(names[place]) if self._routing else output.outputs[0].routed_experts
                        yield place, _completion(output.outputs[0], routing, entropies=sampling.entropies)
        finally:
            if places:
                engine.abort_request(list(places))
            if self._routing:
                self._routing.clear()

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        import vllm

        assert self._fork_decoding or not sampling.forks, "construct the engine with fork_decoding=True"
        assert self._entropies or not sampling.entropies, "construct the engine with entropies=True"
        own = {"flat_logprobs": True, "skip_clone": True}  # made for this request alone, so vLLM need not copy it deeply
        return vllm.SamplingParams(**sampling_arguments(request, sampling), **own)

    def refit(self, version: int) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        worker = self._llm.llm_engine.model_executor.driver_worker.worker  # this rank's, in process
        model = worker.get_model()
        with set_current_vllm_config(worker.vllm_config), torch.inference_mode():
            initialize_layerwise_reload(model)
            model.load_weights(iter(self._weights))
            finalize_layerwise_reload(model, worker.model_config)
            vllm_fixes.finish_tied_heads(model)
        self._llm.llm_engine.set_weight_version(str(version))
        self._llm.reset_prefix_cache()

    def refit_metrics(self) -> dict[str, float]:
        return self._cost()

    def sleep(self) -> None:
        """On the CPU vLLM takes the same calls, and keeps its memory."""
        self._llm.sleep(level=2)

    def wake(self, part: Memory) -> None:
        self._llm.wake_up(tags=[part])  # vLLM schedules again once both parts are awake

    def close(self) -> None:
        """Drop the engine; the process groups stay up. Every rank must call."""
        del self._llm
        gc.collect()
        dist.barrier()


def _refusal(config: EngineConfig, error: Exception) -> RecipeError | None:
    """What of the recipe makes vLLM refuse to start, if it can be told."""
    if "KV cache is needed" in str(error):
        return RecipeError(
            f"the KV cache holds no response of {config.longest_sequence:,} tokens, prompt included: raise rollout.kv_cache_mb "
            "(--kv-cache-mb) or rollout.gpu_memory_fraction, or shorten prompts and responses"
        )
    if config.engine:
        return RecipeError(f"rollout.engine is {shown(dict(config.engine))}: vLLM refuses it: {_said(error)}")
    return None


def _said(error: Exception) -> str:
    """The first sentence of an error; pydantic's begin with a heading of their own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1 if "validation error" in lines[0] and len(lines) > 1 else 0]


def _completion(output: Any, routing: Any, *, entropies: bool) -> Completion:
    said, starts = output.logprobs.logprobs, output.logprobs.start_indices
    assert not entropies or all(output.logprobs.token_ids[start + 1] == vllm_entropy.MARK for start in starts)
    return Completion(
        tokens=list(output.token_ids),
        log_probs=[said[start] for start in starts],
        truncated=output.finish_reason == "length",
        versions=[int(span.version) for span in output.weight_versions for _ in range(span.start, span.end)],
        entropies=[said[start + 1] for start in starts] if entropies else [],
        **({} if routing is None else {"routing": torch.as_tensor(routing).to(torch.int16)}),
    )
