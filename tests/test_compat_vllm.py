"""The patches of vLLM in megafork.compat: vLLM still fails without each, and works with it. See test_compat.py."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, on_ranks
from tiny import FolderWeights, recipe, save_model

from megafork.compat import vllm as vllm_fixes
from megafork.compat import vllm_entropy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.rollout.colocated import ColocatedEngine
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Request, Sampling, request_seed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA")


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
    seen["has shared memory"] = hasattr(torch.ops._C, "init_shm_manager")  # vLLM's build for processors without AVX-512 has none
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
        assert bool(seen["shared memory"]) is seen["has shared memory"]
        assert all(name.endswith("(deleted)") for name in seen["shared memory"])
        names = seen["shared memory upstream"]
        for name in names:
            Path(name).unlink(missing_ok=True)  # upstream leaves them to the next run
        assert bool(names) is seen["has shared memory"]
        assert not any(re.search("[0-9a-f]{32}", name) or name.endswith("(deleted)") for name in names), "private_shared_memory()"
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
