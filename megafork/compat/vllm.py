"""vLLM inside a training rank: its environment, and protection of the host process from its side effects (vLLM 0.26 to 0.32)."""

from __future__ import annotations

import contextlib
import inspect
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the rank: weights are handed over as tensors
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # it ignores the positions that YaRN adds; megafork has checked them against the recipe
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share the cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes 12 s and gains nothing at this size
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",  # drafts from n-grams make OpenMP's threads as many in the whole process: ranks then wait for each other
}


def prepare() -> None:
    """Set vLLM's environment, except variables that the user has set. Call before vLLM is first imported."""
    on_cpu = {} if torch.cuda.is_available() else _CPU_ENVIRONMENT
    for name, value in {**_ENVIRONMENT, **on_cpu}.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Wrap the construction of an engine: restores the environment, the thread setter and the random state that vLLM changes.

    vLLM seeds the process-wide generators, sets LD_PRELOAD and LOCAL_WORLD_SIZE, and replaces `torch.set_num_threads`.
    """
    environment, threads, set_threads, random = dict(os.environ), torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state()
    try:
        yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


@contextlib.contextmanager
def private_shared_memory() -> Iterator[None]:
    """Wrap the construction of an engine, on every rank of the world, to give its shared memory a name unique to this job.

    On the CPU the ranks of an engine communicate through shared memory whose name is the same for all jobs on a host. It is also unlinked
    once every rank has opened it, so that a killed run leaves nothing behind that breaks the next.
    """
    name: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    original = ExecutorWithExternalLauncher._distributed_args
    # vLLM takes the name from after the last colon of the init method, which torch, having joined the world already, ignores.
    ExecutorWithExternalLauncher._distributed_args = lambda self: (f"env://:{name[0]}", *original(self)[1:])
    try:
        yield
    finally:
        ExecutorWithExternalLauncher._distributed_args = original
        for leftover in Path("/dev/shm").glob(f"{name[0]}-*"):
            leftover.unlink(missing_ok=True)


def keep_process_groups() -> None:
    """Keep vLLM from destroying the default process group, which is the trainer's, when an engine shuts down."""
    import vllm.v1.engine.core as core

    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None


def mend_engine() -> None:
    """Mend what is wrong with engines on the CPU. Call in every process with an engine, before it is made; further calls change nothing."""
    if torch.cuda.is_available():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the CPU's runner is a subclass

    wrap_once(GPUModelRunner, "sample_tokens", _with_generators_aside)
    wrap_once(UnquantizedFusedMoEMethod, "_setup_kernel", _packing_again)
    wrap_once(CPUUnquantizedExperts, "apply", _with_own_experts)
    rejection_sampler.expand_batch_to_tokens = _expand


def wrap_once(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a method or function by `wrapper(method)`, unless it has been."""
    original = getattr(owner, name)
    if not getattr(original, "mended", False):
        mended = wrapper(original)
        mended.mended = True
        setattr(owner, name, mended)


def _with_generators_aside(original: Any) -> Any:
    """Withholds a request's generator while its prompt is still being read.

    On the CPU an engine crashes on a seeded request whose prompt takes two steps (0.32, "CPU Generator does not use offset"): vLLM also
    samples in the first step and then rewinds the generator, which only CUDA's supports.
    """

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        unread = [int(row) for row in self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]]
        aside = {row: generators.pop(row) for row in unread if row in generators}
        with torch.random.fork_rng(devices=[], enabled=bool(aside)):  # rows without a generator draw from the global one
            try:
                return original(self, *args, **kwargs)
            finally:
                generators.update(aside)

    return sample_tokens


def _packing_again(original: Any) -> Any:
    """Lays out experts for the CPU's kernel again after a reload.

    vLLM (0.32) pads and packs them only when it first loads them. Reloaded ones are copied over the packed ones as they are: the engine
    fails if they were padded, and if not, its answers are silently wrong.
    """

    def setup_kernel(self: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        reloaded = self.moe_kernel is not None
        original(self, layer, *args, **kwargs)
        if reloaded:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    return setup_kernel


def _with_own_experts(original: Any) -> Any:
    """Gives the experts of other ranks the weight 0, where the ranks of an engine share them.

    The CPU's kernel (0.32) is given the numbers of experts in the whole model, and takes them for those in the rank, with silently wrong
    answers.
    """
    signature = inspect.signature(original)

    def apply(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        values = given.arguments
        if values["expert_map"] is not None:
            here = values["expert_map"].long()[values["topk_ids"].long()]  # -1: on another rank
            values["topk_weights"] = values["topk_weights"].masked_fill(here < 0, 0.0)
            values["topk_ids"] = here.clamp(min=0).to(values["topk_ids"].dtype)
        original(*given.args, **given.kwargs)

    return apply


def _expand(values: Any, ends: Any, count: int, replace_from: int = 0, replace_to: int = 0) -> torch.Tensor:
    """Gives drafts under speculative decoding the temperatures of their requests. On the CPU vLLM (0.32) writes them into a copy that it
    drops, and divides logits by uninitialised memory."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    return values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts, output_size=count)


def finish_tied_heads(model: torch.nn.Module) -> None:
    """Repack tied heads after a weight reload; call after every reload.

    On the CPU a tied head keeps a packed copy of the embedding, which a reload silently leaves stale (log-probs off by 2).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)
