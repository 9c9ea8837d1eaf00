"""Every patch in megafork.compat: the library still fails without it, and works with it.

If a test fails because the library no longer does, delete the patch. Ranks are forked, so a patch that a test undoes is undone only there.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import on_ranks
from rehearsal import DEVICE, rehearse
from responses import make_responses
from tiny import TINY, recipe, save_model

from megafork.compat import megatron as megatron_fixes
from megafork.compat import noise
from megafork.compat.cpu import CpuRngTracker
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Parallel, Recipe
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
