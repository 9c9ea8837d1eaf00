"""vLLM in the training rank: one engine of `rollout.tp` ranks, and as many engines as the world holds. Weights arrive as tensors."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.compat import vllm as vllm_fixes
from megafork.compat import vllm_fp8
from megafork.model.fp8 import CONFIG
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe
from megafork.rollout.engine import Completion, Progress, Request, Sampling, unheard
from megafork.shape import check_engines


class ColocatedEngine:
    """A real vLLM engine that shares its process with the trainer.

    Its weights are undefined until the first `refit`. Every rank of the world constructs one together. `fork_decoding`: whether requests
    may ask for `Sampling.forks`, which costs an engine some of its overlap even where none does.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, *, fork_decoding: bool = False) -> None:
        check_engines(recipe.rollout.tp, mesh.world)
        vllm_fixes.prepare()
        import vllm

        vllm_fixes.keep_process_groups()
        if recipe.precision.rollout_fp8 and mesh.device.type != "cuda":
            vllm_fp8.install()
        self.tp = recipe.rollout.tp
        self.rank = mesh.rank % self.tp
        """This rank's place in its engine; rank 0 answers for the engine."""
        self.number = mesh.rank // self.tp
        """Which of the engines this is."""
        self.engines = mesh.world // self.tp
        self.fork_decoding = fork_decoding
        self.progress: Progress = unheard
        with vllm_fixes.contained(), vllm_fixes.private_shared_memory():
            vllm_fixes.put_generators_aside()  # what it imports sets variables as well
            self._llm = vllm.LLM(**self._arguments(recipe, mesh))

    def _arguments(self, recipe: Recipe, mesh: Mesh) -> dict[str, Any]:
        on_gpu = mesh.device.type == "cuda"
        cache = recipe.rollout.kv_cache_mb or (None if on_gpu else 256)
        return {
            "model": recipe.model.path,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[recipe.precision.dtype],
            "tensor_parallel_size": self.tp,
            "distributed_executor_backend": "external_launcher",
            "max_model_len": recipe.longest_sequence,
            "max_num_seqs": recipe.rollout.max_running,
            "gpu_memory_utilization": recipe.rollout.gpu_memory_fraction,
            "kv_cache_memory_bytes": cache * 2**20 if cache else None,
            "enforce_eager": not on_gpu,
            "enable_sleep_mode": on_gpu,
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as the trainer computes them
            "generation_config": "vllm",  # no sampling defaults from the model's folder
            "seed": recipe.run.seed,
            "disable_log_stats": True,
            "logits_processors": self._processors(),
            "hf_overrides": CONFIG if recipe.precision.rollout_fp8 else None,
        }

    def _processors(self) -> list[type] | None:
        if not self.fork_decoding:
            return None
        from megafork.rollout.logits_processor import ForkProcessor

        return [ForkProcessor]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        answers = dict(self.stream(requests, sampling))
        return [answers[place] for place in range(len(requests))]

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Generator[tuple[int, Completion], None, None]:
        """Each completion as soon as it ends, with its request's place. Closing the iterator early drops what is left."""
        if not requests:
            return
        prompts: list[Any] = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        names = self._llm.enqueue(prompts, [self._parameters(request, sampling) for request in requests], use_tqdm=False)
        places = {name.partition("-")[0]: place for place, name in enumerate(names)}  # what comes back lacks the random end of the name
        engine = self._llm.llm_engine

        def state() -> str:
            drawn = sum(one.detokenizer.num_output_tokens() for one in engine.output_processor.request_states.values())
            return f"{len(places):,} responses to finish, {drawn:,} tokens of them drawn"

        try:
            while engine.has_unfinished_requests():
                self.progress(state)
                for output in engine.step():
                    if output.finished:
                        yield places.pop(output.request_id), _completion(output.outputs[0])
        finally:
            if places:
                engine.abort_request(list(places))

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        import vllm

        assert self.fork_decoding or not sampling.forks, "construct the engine with fork_decoding=True"
        return vllm.SamplingParams(
            seed=request.seed,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop),
            ignore_eos=True,  # the stop tokens say it all
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            **sampling.at,
        )

    def refit(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        worker = self._llm.llm_engine.model_executor.driver_worker.worker  # this rank's, in process
        model = worker.get_model()
        with set_current_vllm_config(worker.vllm_config), torch.inference_mode():
            initialize_layerwise_reload(model)
            model.load_weights(iter(weights))
            finalize_layerwise_reload(model, worker.model_config)
            vllm_fixes.finish_tied_heads(model)
        self._llm.llm_engine.set_weight_version(str(version))
        self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        if torch.cuda.is_available():
            self._llm.sleep(level=2)

    def wake(self) -> None:
        if torch.cuda.is_available():
            self._llm.wake_up()

    def close(self) -> None:
        """Drop the engine; the process groups stay up. Every rank calls."""
        del self._llm
        gc.collect()
        dist.barrier()


def _completion(output: Any) -> Completion:
    return Completion(
        tokens=list(output.token_ids),
        log_probs=list(output.logprobs.logprobs),
        truncated=output.finish_reason == "length",
        versions=[int(span.version) for span in output.weight_versions for _ in range(span.start, span.end)],
    )
