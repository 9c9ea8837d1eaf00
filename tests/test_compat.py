"""Every patch in megafork.compat: the library still fails without it, and works with it.

If a test fails because the library no longer does, delete the patch. Ranks are forked, so a patch that a test undoes is undone only there.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import free_port, on_ranks
from rehearsal import DEVICE, rehearse
from responses import make_responses
from tiny import TINY, FolderWeights, recipe, save_model

from megafork.compat import experts as expert_fixes
from megafork.compat import megatron as megatron_fixes
from megafork.compat import noise, vllm_entropy
from megafork.compat import vllm as vllm_fixes
from megafork.compat.cpu import CpuRngTracker
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Parallel, Recipe
from megafork.rollout.colocated import ColocatedEngine
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Request, Sampling, request_seed
from megafork.shape import read_shape
from megafork.train.learner import Learner
from megafork.train.sft import cross_entropy, place
from megafork.weights.checkpoint import Checkpoints
from megafork.weights.huggingface import HuggingFaceWeights
from megafork.weights.policy_weights import load_policy

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")

CUDA_CALLS = [
    "torch.tensor([1.0], device='cuda')",
    "torch.zeros(2, device='cuda:0')",
    "torch.ones(2, device=0)",
    "torch.empty(2, device=torch.cuda.current_device())",
    "torch.empty_like(torch.ones(2), device='cuda')",
    "torch.empty(2, pin_memory=True)",
    "torch.ones(2).cuda()",
    "torch.cuda.synchronize()",
    "torch.cuda.set_device(0)",
    "torch.cuda.reset_peak_memory_stats()",
    "torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())",
    "torch.cuda.Stream()",
    "torch.cuda.Event().record()",
]
WITHOUT = """
import sys, torch
for call in sys.argv[1:]:
    try:
        eval(call)
    except (AssertionError, AttributeError, RuntimeError):
        continue
    print(call)
"""


def test_calls_that_name_cuda() -> None:
    """`megafork.model` has installed the patch in this process."""
    for call in CUDA_CALLS:
        result = eval(call, {"torch": torch})
        assert not isinstance(result, torch.Tensor) or result.device.type == "cpu", call
    bare = subprocess.run([sys.executable, "-c", WITHOUT, *CUDA_CALLS], capture_output=True, text=True, check=True)
    assert bare.stdout == "", "these work without the patch"


def test_a_default_device_still_reaches_the_redirected_constructors() -> None:
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.tensor([1.0]), torch.empty_like(torch.ones(1))]
    assert all(tensor.is_meta for tensor in made)
    program = """
import functools, torch
original = torch.empty
torch.empty = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))
with torch.device("meta"):
    print(torch.empty(2).is_meta)
"""
    bare = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert bare.stdout == "False\n", "torch no longer caches its constructors: no need to fill the cache first"


def test_transformers_loads_right_rotary_buffers(tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path))
    exponent = torch.arange(0, TINY["head_dim"], 2).float() / TINY["head_dim"]
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, TINY["rope_theta"] ** -exponent)


def test_named_random_states() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        CudaRNGStatesTracker().add("dropout", 1)
    tracker = CpuRngTracker()
    tracker.add("dropout", 1)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with tracker.fork("dropout"):
        first = torch.rand(2)
    state = tracker.get_states()
    with tracker.fork("dropout"):
        second = torch.rand(2)
    assert torch.equal(torch.rand(2), expected), "the fork leaves the main state alone"
    assert not torch.equal(first, second)
    tracker.set_states(state)
    with tracker.fork("dropout"):
        assert torch.equal(torch.rand(2), second)


def _learner(spec: Recipe) -> tuple[Learner, Mesh]:
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    folder = Path(spec.model.path)
    shape = read_shape(folder)
    chunks = build_policy(shape, PolicyConfig.of(spec), mesh)
    load_policy(chunks, HuggingFaceWeights(folder), shape, mesh)
    return Learner(chunks, spec, mesh, updates=9), mesh


def _raised(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (AssertionError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _optimizer_without_type_strings(spec: Recipe) -> str:
    torch.Tensor.type = torch.Tensor.type.__wrapped__  # type: ignore[attr-defined, method-assign]
    return _raised(_learner, spec)


def test_the_optimizer_knows_only_tensor_types_of_cuda(tmp_path: Path) -> None:
    assert torch.ones(1).type() == "torch.FloatTensor", "only megatron's own code is told another type"
    [error] = on_ranks(1, _optimizer_without_type_strings, recipe(save_model(tmp_path)))
    assert error.startswith("TypeError") and "torch.cuda" in error


def _optimizer_life(spec: Recipe, folder: Path) -> dict[str, Any]:
    """What the optimizer's state goes through, with and without each fix."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    learner, mesh = _learner(spec)
    [inner] = learner.optimizer.chained_optimizers
    adam = inner.optimizer
    seen: dict[str, Any] = {}
    seen["state_dict works"] = _raised(inner.state_dict)
    filled = dict(adam.state)
    adam.state.clear()
    seen["state_dict before a step"] = _raised(inner.state_dict)
    adam.state.update(filled)

    for group in adam.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    adam.step()
    checkpoints = Checkpoints(folder, mesh, keep_last=1)
    checkpoints.save(1, learner.chunks, learner.optimizer, {})
    inner.__class__ = DistributedOptimizer
    seen["load without the fixes"] = _raised(checkpoints.load, 1, learner.chunks, learner.optimizer)
    inner.__class__ = megatron_fixes.FixedDistributedOptimizer
    saved = inner.state_dict()

    def steps(load: Any) -> list[float]:
        load(inner, saved)
        adam.step()
        return [float(state["step"]) for state in adam.state.values()]

    seen["steps without the fix"] = steps(DistributedOptimizer.load_state_dict)
    checkpoints.load(1, learner.chunks, learner.optimizer)
    adam.step()
    seen["steps"] = [float(state["step"]) for state in adam.state.values()]
    return seen


def test_optimizer_state_survives_a_checkpoint(tmp_path: Path) -> None:
    spec = recipe(save_model(tmp_path / "model"))
    [seen] = on_ranks(1, _optimizer_life, spec, tmp_path / "checkpoints")
    assert seen["state_dict works"] == ""
    assert seen["state_dict before a step"].startswith("AssertionError")
    assert seen["load without the fixes"] == "KeyError: 'step'"
    assert set(seen["steps"]) == {2.0}
    assert max(seen["steps without the fix"]) > 2.0, "the parameters share one count of steps"


def _norms() -> list[tuple[float, int]]:
    """The norm of gradients by upstream's function and by ours, and how often each waits for the GPU."""
    from megatron.core.optimizer import clip_grads

    ledger, found = rehearse(), []
    gradients = [torch.linspace(-1.0, n, 7 * n).to(DEVICE) for n in range(1, 9)]
    for patch in (lambda: None, megatron_fixes.keep_norms_on_device):
        patch()
        with ledger.during() as noted:
            norm, _ = clip_grads.l2_norm_impl(65536, None, [gradients], False)
        found.append((norm.item(), len(noted.of("wait"))))
    return found


def test_the_norm_of_gradients_waits_for_no_parameter() -> None:
    [[(upstream, waits), (ours, none)]] = on_ranks(1, _norms)
    assert ours == upstream and none == 0
    assert waits >= 8, "upstream no longer reads each parameter's norm"


def _shapes() -> list[tuple[Any, int]]:
    """Of what two pipeline stages send each other, by upstream's function and by ours, and the waits of each."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.transformer.transformer_config import TransformerConfig

    ledger, found = rehearse(), []
    mesh = build_mesh(Parallel(pp=2), seed=1, device=DEVICE)
    group = mpu.get_pipeline_model_parallel_group()
    stages = P2PCommunicator(group, TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=1))
    hidden = torch.zeros(5 + mesh.pp_rank, 1, 8, device=DEVICE)
    for patch in (lambda: None, megatron_fixes.exchange_shapes_on_host):
        patch()
        with ledger.during() as noted:
            first = mesh.pp_rank == 0
            shapes = stages._communicate_shapes(hidden if first else None, None if first else hidden, not first, first)
        found.append((shapes, len(noted.of("wait"))))
    return found


def test_pipeline_stages_exchange_shapes_without_the_gpu() -> None:
    for rank, [(upstream, waits), (ours, none)] in enumerate(on_ranks(2, _shapes)):
        assert ours == upstream == (([0, 0, 0], [6, 1, 8]) if rank == 0 else ([5, 1, 8], [0, 0, 0]))
        assert none == 0
        assert waits >= 3, "upstream no longer waits"


def _router_logits() -> tuple[str, torch.Tensor]:
    """What upstream's router says without Transformer Engine, and what it computes with the fix."""
    from megatron.core.transformer.moe import moe_utils

    hidden, weight = torch.arange(6.0).reshape(3, 1, 2), torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    said = _failure(lambda: moe_utils.router_gating_linear(hidden, weight, None, torch.float32))
    expert_fixes.run_without_transformer_engine()
    return said, moe_utils.router_gating_linear(hidden, weight, None, torch.float32)


def _failure(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - what it says is the test's result
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_the_router_runs_without_transformer_engine() -> None:
    [(said, logits)] = on_ranks(1, _router_logits)
    assert said.startswith("NameError: name 'te_general_gemm'"), "upstream defines it"
    assert torch.equal(logits, torch.tensor([[[2.0, -1.0]], [[8.0, -3.0]], [[14.0, -5.0]]]))


def _events() -> list[bool]:
    """Whether the dispatcher's stream gives an event beside vLLM: by the class that it takes, and with the fix."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from vllm.v1.worker.cpu import shm

    expert_fixes.wait_for_no_stream()
    return [stream.record_event() is not None for stream in (shm.torch.cuda.Stream(), MoEAlltoAllTokenDispatcher.cuda_dtoh_stream)]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs vLLM's worker for the CPU, which a GPU's vLLM does not use")
def test_the_dispatcher_waits_for_no_stream_beside_vllm() -> None:
    [[upstream, ours]] = on_ranks(1, _events, engines=True)
    assert ours
    assert not upstream, "vLLM's stand-in for a stream now gives events"


def _uneven_exchange() -> dict[str, Any]:
    """Rank r has r + 1 rows: what upstream says of it, and what comes with the fixes, forward and backward."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    rows = torch.full((rank + 1, 2), float(rank + 1), requires_grad=True)
    sent, received = torch.tensor([rank + 1, 0]), torch.tensor([1, 2]) if rank == 0 else torch.tensor([0, 0])
    gather = mappings.gather_from_sequence_parallel_region
    seen: dict[str, Any] = {
        "splits upstream": _failure(lambda: mappings.all_to_all(world, rows, received, sent)),
        "gather upstream": _failure(lambda: gather(rows, group=world, output_split_sizes=[1, 2])),
    }
    expert_fixes.read_splits_on_host()
    expert_fixes.gather_uneven_rows()
    to_host = token_dispatcher.maybe_move_tensor_to_cpu
    seen["splits"] = mappings.all_to_all(world, rows, to_host(received, as_numpy=True), to_host(sent, as_numpy=True)).detach()
    seen["gather"] = gather(rows, group=world, output_split_sizes=[1, 2])
    (seen["gather"] * torch.tensor([[1.0], [10.0], [100.0]]) * (rank + 1)).sum().backward()
    seen["gather"], seen["gradient"] = seen["gather"].detach(), rows.grad
    return seen


def test_tokens_of_uneven_number_are_exchanged_over_gloo() -> None:
    first, second = on_ranks(2, _uneven_exchange)
    for seen in (first, second):
        for name in ("splits", "gather"):
            assert seen[f"{name} upstream"], f"upstream's {name} works now"
        assert seen["gather"][:, 0].tolist() == [1.0, 2.0, 2.0]
    assert first["splits"][:, 0].tolist() == [1.0, 2.0, 2.0] and second["splits"].shape == (0, 2)
    assert first["gradient"][:, 0].tolist() == [3.0] and second["gradient"][:, 0].tolist() == [30.0, 300.0]


def _queue_processes() -> tuple[int, int]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    megatron_fixes.write_checkpoints_in_one_process()
    results = filesystem_async._get_write_results_queue()
    assert "was killed" in str(results.get_nowait())
    results.put({"any": "thing"})
    assert results.get_nowait() == {"any": "thing"}
    fixed = len(psutil.Process().children())
    filesystem_async._results_queue = None
    filesystem_async._get_write_results_queue()
    started = psutil.Process().children()
    for process in started:
        process.kill()
    return fixed, len(started)


def test_saving_starts_no_manager_process() -> None:
    [(fixed, upstream)] = on_ranks(1, _queue_processes)
    assert fixed == 0
    assert upstream > 0


def _warnings_of_a_step(spec: Recipe) -> tuple[set[str], set[str]]:
    """Warnings of building a model and training a step; and the same once more, silenced."""
    seen = []
    for silenced in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if silenced:
                noise.silence()
            learner, mesh = _learner(spec)
            learner.train(place(make_responses([(3, 4)] * 4), spec, mesh), cross_entropy)
            checkpoints = Checkpoints(Path(spec.model.path) / "checkpoints", mesh, keep_last=1)
            checkpoints.save(1, learner.chunks, learner.optimizer, {})
            checkpoints.load(1, learner.chunks, learner.optimizer)
        seen.append({str(warning.message) for warning in caught})
    return seen[0], seen[1]


def test_commands_can_be_imported_without_torch() -> None:
    """Its C++ parts read which warnings to show when it is imported, and `noise.silence` decides that first."""
    program = "import sys, megafork.cli, megafork.commands, megafork.ranks, megafork.gpus; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_megatrons_warnings_are_silenced_one_by_one(tmp_path: Path) -> None:
    spec = recipe(save_model(tmp_path), train={"micro_batch_tokens": 64})
    for loud, quiet in on_ranks(2, _warnings_of_a_step, spec):
        for _, message, module in noise.WARNINGS:
            if module.startswith(("megatron", "torch")):
                assert any(re.match(message, text) for text in loud), f"nobody warns of {message!r} any more"
                assert not any(re.match(message, text) for text in quiet)


@pytest.mark.slow
def test_vllm_still_remarks_on_triton() -> None:
    """That a run does not is seen by test_cli.py."""
    program = "from megafork.compat import vllm; vllm.prepare(); import vllm.triton_utils"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "doesn't include CPU backend" in done.stderr


def _process_state() -> dict[str, Any]:
    return {
        **os.environ,
        "thread setter": torch.set_num_threads,
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
    }


def _changed(before: dict[str, Any]) -> set[str]:
    after = _process_state()
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _shared_memory() -> list[str]:
    """This process's mappings of vLLM's shared memory; a name that was unlinked ends in (deleted)."""
    return sorted({line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "cpushm" in line})


def _refit_and_sample(engine: ColocatedEngine) -> list[float]:
    engine.refit(1)
    [completion] = engine.generate([Request([5, 6, 7], seed=3)], Sampling(max_tokens=8))
    return completion.log_probs


def _engine_life(spec: Recipe, folders: list[Path], port: int) -> dict[str, Any]:
    """A vLLM engine of TP 2, first with every fix, then without: what it does to the process that hosts it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    vllm_fixes.prepare()
    import vllm
    import vllm.v1.engine.core as core
    from vllm.distributed.parallel_state import destroy_model_parallel

    cleanup, finish = core.cleanup_dist_env_and_memory, vllm_fixes.finish_tied_heads
    torch.manual_seed(11)
    before = _process_state()
    weights = FolderWeights(folders[0])
    engine = ColocatedEngine(EngineConfig.of(spec), mesh, weights)
    seen: dict[str, Any] = {"changed": _changed(before), "shared memory": _shared_memory()}
    for name, weights.folder in zip(("first", "second", "first again"), (*folders, folders[0]), strict=True):
        seen[name] = _refit_and_sample(engine)
    vllm_fixes.finish_tied_heads = lambda model: None
    weights.folder = folders[1]
    seen["second unfinished"] = _refit_and_sample(engine)
    vllm_fixes.finish_tied_heads = finish
    arguments = engine._arguments(EngineConfig.of(spec), mesh)
    engine.close()
    seen["group after close"] = dist.is_initialized()

    destroy_model_parallel()  # so that the next engine makes groups of its own
    core.cleanup_dist_env_and_memory = cleanup
    before = _process_state()
    llm = vllm.LLM(**arguments)
    seen["changed upstream"] = _changed(before)
    dist.barrier()
    seen["shared memory upstream"] = [name for name in _shared_memory() if name not in seen["shared memory"]]
    dist.barrier()
    del llm
    gc.collect()
    seen["group after upstream's close"] = dist.is_initialized()
    return seen


@pytest.mark.slow
def test_an_engine_leaves_its_host_alone(tmp_path: Path) -> None:
    folders = [save_model(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    spec = recipe(folders[0], parallel={"tp": 2}, rollout={"tp": 2, "kv_cache_mb": 32})
    for seen in on_ranks(2, _engine_life, spec, folders, free_port()):
        assert seen["changed"] == set()
        assert seen["changed upstream"] >= {"LD_PRELOAD", "thread setter", "random"}, "contained()"
        assert seen["shared memory"] and all(name.endswith("(deleted)") for name in seen["shared memory"])
        names = seen["shared memory upstream"]
        for name in names:
            Path(name).unlink(missing_ok=True)  # upstream leaves them to the next run
        assert names and not any(re.search("[0-9a-f]{32}", name) or name.endswith("(deleted)") for name in names), "private_shared_memory()"
        assert seen["first"] == seen["first again"] != seen["second"]
        assert seen["second unfinished"] != seen["second"], "finish_tied_heads()"
        assert seen["group after close"]
        assert not seen["group after upstream's close"], "keep_process_groups()"


def _together_and_alone(spec: Recipe, port: int, patched: bool) -> Any:
    """Long prompts of several requests, more than vLLM reads in a step: asked together, and one after the other."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    if not patched:
        vllm_fixes._with_generators_aside = lambda original: original
    engine = ColocatedEngine(EngineConfig.of(spec), mesh, FolderWeights(Path(spec.model.path)))
    engine.refit(1)
    requests = [Request([(7 * n + place * (n + 1)) % 99 for place in range(400)], request_seed(1, n)) for n in range(24)]
    sampling = Sampling(max_tokens=6, temperature=1.0)
    try:
        together = engine.generate(requests, sampling)
    except RuntimeError as error:
        return str(error)
    return [together, [engine.generate([request], sampling)[0] for request in requests]]


@pytest.mark.slow
def test_a_prompt_that_is_read_in_two_steps_changes_nothing(tmp_path: Path) -> None:
    spec = recipe(save_model(tmp_path), data={"max_prompt_length": 400}, rollout={"max_response_length": 8, "kv_cache_mb": 64})
    together, alone = on_ranks(1, _together_and_alone, spec, free_port(), True, engines=True)[0]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    unpatched = on_ranks(1, _together_and_alone, spec, free_port(), False, engines=True)[0]
    assert unpatched == "CPU Generator does not use offset", "vLLM no longer needs compat.vllm._with_generators_aside"


# ---- vLLM's samplers


def _v1_scores() -> tuple[Any, Any]:
    from vllm.v1.sample.sampler import Sampler

    log_probs = torch.tensor([[0.0, 1.0, -torch.inf, 3.0], [2.0, 2.0, 2.0, 2.0]]).log_softmax(-1)
    drawn = torch.tensor([3, 0])
    bare = Sampler.gather_logprobs(log_probs, vllm_entropy.ASKED, drawn)
    vllm_entropy.install()
    vllm_entropy.install()  # once more changes nothing
    kept = log_probs.clone()
    answers = [Sampler.gather_logprobs(log_probs, count, drawn) for count in (0, 1, vllm_entropy.ASKED)]
    assert torch.equal(kept, log_probs)
    return bare, answers


@pytest.mark.slow
def test_entropies_beside_log_probs() -> None:
    [(bare, (own, most_likely, asked))] = on_ranks(1, _v1_scores, engines=True)
    assert vllm_entropy.MARK not in bare.logprob_token_ids, "vLLM now answers so by itself"
    assert own.logprobs.shape == (2, 1) and most_likely.logprob_token_ids[0].tolist() == [3, 3]
    assert asked.logprob_token_ids.tolist() == [[3, -1, -1], [0, -1, -1]]
    assert torch.equal(asked.logprobs[:, :1], own.logprobs) and torch.equal(asked.selected_token_ranks, own.selected_token_ranks)
    p = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64).softmax(-1)
    expected = [float(-(p * p.log()).sum()), float(torch.tensor(4.0).log())]
    assert asked.logprobs[:, 1].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(asked.logprobs[:, 1], asked.logprobs[:, 2])


V2 = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from types import SimpleNamespace
from triton.backends import backends
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # or vLLM turns Triton off
import torch
from megafork.compat import vllm as vllm_fixes, vllm_entropy
vllm_fixes.prepare()
from vllm.v1.worker.gpu.sample import sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
torch.manual_seed(0)
logits, drawn = (3 * torch.randn(5, 300)).bfloat16(), torch.tensor([1, 2, 3, 0, 299])
bare = sampler.compute_topk_scores(logits, 2, drawn)
assert vllm_entropy.MARK not in bare.logprob_token_ids
vllm_entropy.install()
for module in (sampler, rejection_sampler):
    asked = module.compute_topk_scores(logits, 2, drawn, [0, 2, 5])
    assert asked.logprob_token_ids.tolist() == [[token, -1, -1] for token in drawn.tolist()]
    assert asked.cu_num_generated_tokens == [0, 2, 5]
    assert torch.equal(asked.logprobs[:, 0], bare.logprobs[:, 0])
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(asked.logprobs[:, 1].double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(module.compute_topk_scores(logits, 1, drawn).logprobs, bare.logprobs[:, :2])
"""


@pytest.mark.slow
def test_entropies_of_the_second_model_runner() -> None:
    """Its kernels, in Triton's interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", V2], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def _temperatures() -> tuple[list[float], list[float]]:
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample import rejection_sampler

    values, ends, written = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 3, 3], dtype=torch.int32), torch.full((3,), -1.0)
    cpu_triton_utils._expand_kernel_impl(written, values, ends, 0, 1)
    vllm_fixes.mend_engine()
    return written.tolist(), rejection_sampler.expand_batch_to_tokens(values, ends, 3, replace_from=0, replace_to=1).tolist()


@pytest.mark.slow
def test_temperatures_of_drafts() -> None:
    [(before, after)] = on_ranks(1, _temperatures, engines=True)
    assert before != [0.5, 0.5, 1.0], "vLLM's CPU kernel now writes its result: delete the patch"
    assert after == [0.5, 0.5, 1.0]
