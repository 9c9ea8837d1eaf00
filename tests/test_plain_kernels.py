"""Plain layers as a GPU computes them: one attention call for sequences of any lengths, norms in one kernel, SwiGLU in one each way.

`varlen` gives torch's attention call a CPU kernel; torch's own norm has one for the CPU, too. Megatron's SwiGLU, which a GPU compiles, runs
uncompiled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import inductor
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import varlen
from ranks import on_ranks

from megafork.model import attention
from megafork.model.attention import PackedCoreAttention, PackedSequences
from megafork.model.build import PolicyConfig, transformer_config
from megafork.model.policy import RMSNorm
from megafork.parallel.context import places_of, unzigzag_index, zigzag_index
from megafork.parallel.mesh import build_mesh
from megafork.plan.models import KNOWN
from megafork.recipe import Parallel, Precision

LENGTHS = [8, 24, 8, 8, 4]
HEADS, GROUPS, DIM = 4, 2, 16


class Config:
    """What the core attention and the norm read of Megatron's."""

    kv_channels = DIM
    params_dtype = torch.float32
    sequence_parallel = False


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention within each sequence, in float64."""
    outs = []
    for q, k, v in zip(*(x.double().split(LENGTHS) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        share = (torch.einsum("qhd,khd->hqk", q, k) / DIM**0.5).masked_fill(later, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", share, v))
    return torch.cat(outs)


def _attend(monkeyed: bool) -> None:
    """This rank's share of the outputs, and of the gradients, is the reference's."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    varlen.install()
    attention.in_one_call = lambda query: monkeyed
    rank, cp = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = [torch.randn(sum(LENGTHS), heads, DIM, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    weight = torch.randn(sum(LENGTHS), HEADS, DIM)
    wanted = reference(*whole)
    gradients = torch.autograd.grad((wanted * weight).sum(), whole)

    held = zigzag_index(LENGTHS, cp, rank)
    groups: Any = ProcessGroupCollection(cp=dist.group.WORLD)
    core = PackedCoreAttention(Config(), 1, AttnMaskType.causal, "self", pg_collection=groups)
    packing = PackedSequences.packed(LENGTHS, places_of(LENGTHS, held), unzigzag_index(LENGTHS, cp) if cp > 1 else None)
    local = [x.detach()[held].requires_grad_() for x in whole]
    found = core(*local, packed_seq_params=packing.for_plain_layers(cp, rank)).view(-1, HEADS, DIM)
    torch.testing.assert_close(found.double(), wanted[held], atol=1e-5, rtol=0)
    for got, full in zip(torch.autograd.grad((found * weight[held]).sum(), local), gradients, strict=True):
        torch.testing.assert_close(got, full[held], atol=1e-5, rtol=0)


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("cp", [1, 2])
def test_attention_is_within_each_sequence(cp: int, one_call: bool) -> None:
    on_ranks(cp, _attend, one_call)


def test_the_gpu_s_call_is_for_16_bits_and_heads_that_it_knows() -> None:
    class OnGpu:
        is_cuda = True

        def __init__(self, dtype: torch.dtype, dim: int) -> None:
            self.dtype, self.dim = dtype, dim

        def size(self, _: int) -> int:
            return self.dim

    for dtype, dim, known in [
        (torch.bfloat16, 128, True),
        (torch.float32, 128, False),
        (torch.bfloat16, 100, False),
        (torch.bfloat16, 512, False),
    ]:
        assert attention.in_one_call(OnGpu(dtype, dim)) is known  # type: ignore[arg-type]
    assert not attention.in_one_call(torch.zeros(2, 2, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_a_norm_in_one_kernel_is_the_norm(dtype: torch.dtype, allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = RMSNorm(Config(), 64, eps=1e-3).to(dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    hidden, weight = torch.randn(9, 64, dtype=dtype, requires_grad=True), torch.randn(9, 64).to(dtype)
    wide, scale = hidden.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    wanted = scale * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    gradients = torch.autograd.grad((wanted * weight.double()).sum(), (wide, scale))
    for one_kernel in (True, False):
        monkeypatch.setattr("megafork.model.policy.in_one_kernel", lambda _, one=one_kernel: one)
        found = norm(hidden)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, atol=allowed, rtol=allowed)
        for got, full in zip(torch.autograd.grad((found * weight).sum(), (hidden, norm.weight)), gradients, strict=True):
            torch.testing.assert_close(got.double(), full, atol=8 * allowed, rtol=8 * allowed)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("weighted", [False, True], ids=["MLP", "expert"])
def test_megatron_s_swiglu_and_its_own_gradient(weighted: bool, dtype: torch.dtype, allowed: float) -> None:
    """An expert's output is also multiplied by its tokens' weights, in fp32."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    torch.manual_seed(0)
    both, share = (3 * torch.randn(9, 32)).to(dtype).requires_grad_(), torch.rand(9, 1, requires_grad=True)
    gradient = torch.randn(9, 16).to(dtype)
    wide, part = both.detach().double().requires_grad_(), share.detach().double().requires_grad_()
    wanted = F.silu(wide[..., :16]) * wide[..., 16:] * (part if weighted else 1.0)
    found = weighted_bias_swiglu_impl(both, None, share) if weighted else bias_swiglu_impl(both, None)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=allowed, rtol=allowed)
    inputs, exact = ([both, share], [wide, part]) if weighted else ([both], [wide])
    expected = torch.autograd.grad((wanted * gradient.double()).sum(), exact)
    for got, full in zip(torch.autograd.grad(found, inputs, gradient), expected, strict=True):
        torch.testing.assert_close(got.double(), full, atol=8 * allowed, rtol=8 * allowed)


def _megatron_s_swiglu() -> list[bool]:
    """Whether Megatron's own SwiGLU computes plain layers on the CPU and on a GPU."""
    mesh = build_mesh(Parallel(), seed=1, device=torch.device("cpu"))
    config = PolicyConfig(Precision(dtype="bf16"))
    places = (mesh, replace(mesh, device=torch.device("cuda", 0)))
    return [transformer_config(KNOWN["qwen3-8b"], config, place).bias_activation_fusion for place in places]


def test_megatron_s_swiglu_is_taken_on_a_gpu() -> None:
    assert on_ranks(1, _megatron_s_swiglu) == [[False, True]]


def _code_for_swiglu() -> list[str]:
    from megatron.core.fusions.fused_bias_swiglu import swiglu, swiglu_back

    inductor.play_a_gpu()
    tokens, ffn = 512, 3200
    return [inductor.generated(swiglu, (tokens, 2 * ffn)), inductor.generated(swiglu_back, (tokens, ffn), (tokens, 2 * ffn))]


@pytest.mark.slow
def test_torch_compile_makes_a_kernel_of_swiglu_and_one_of_its_gradient() -> None:
    """The passes that `plan/layers.py` counts: 3 and 7. The first kernel has a thread for each product, 2 loads and 1 store; the second has
    one for each element of the gradient: 3 loads for a gate's, 2 for an up's, and 1 store."""
    forward, backward = on_ranks(1, _code_for_swiglu)[0]
    for code, loads in ((forward, 2), (backward, 3 + 2)):
        assert [code.count(part) for part in ("@triton.jit", "tl.load(", "tl.store(", "extern_kernels.")] == [1, loads, 1, 0], code
