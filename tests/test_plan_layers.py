"""What the plan knows of fused and plain layers: the bytes that each keeps and moves, and what fusing is worth."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import varlen
from ranks import on_ranks
from rich.console import Console
from test_plan import H100, LONG, planned
from test_plan_memory import SHAPE
from tiny import recipe
from torch.utils._python_dispatch import TorchDispatchMode

from megafork.model import attention, build
from megafork.model.attention import PackedSequences
from megafork.model.build import PolicyConfig, build_policy
from megafork.model.policy import HeadRequest
from megafork.parallel.mesh import build_mesh
from megafork.plan import experts
from megafork.plan.activations import layer
from megafork.plan.fixes import fixes
from megafork.plan.layers import Traffic, layers_of, more_than_fused
from megafork.plan.models import KNOWN
from megafork.plan.table import render
from megafork.shape import Shape

B32 = KNOWN["qwen3-32b"]


def spec_of(**changes: Any) -> Any:
    return planned(**changes).recipe


# ---- bytes moved


class Moved(TorchDispatchMode):
    """Bytes that operators read and write; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(value.alias_info for value in func._schema.returns):
            flat = [*args, result] if not isinstance(args[0], list | tuple) else [*args[0], *args[1:], result]
            self.bytes += sum(x.numel() * x.element_size() for x in flat if isinstance(x, torch.Tensor))
        return result


def moved(function: Any, *inputs: torch.Tensor) -> tuple[int, int]:
    """In the forward and in the backward."""
    with Moved() as forward:
        out = function(*inputs)
    gradient = torch.ones_like(out)
    with Moved() as backward:
        torch.autograd.grad(out, inputs, gradient)
    return forward.bytes, backward.bytes


def test_plain_layers_move_what_the_plan_counts() -> None:
    """Megatron's own rotary positions, against one pass over each input and output in fused layers. `test_plain_kernels` has SwiGLU's."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    tokens, heads, groups, d, ffn = 256, 16, 4, 32, 384
    angles = torch.rand(tokens, 1, d)
    half = torch.bfloat16
    total = [0.0, 0.0]
    for count in (heads, groups):
        x = torch.randn(tokens, count, d, dtype=half, requires_grad=True)
        parts = moved(lambda x: _apply_rotary_pos_emb_bshd(x, angles), x)
        total = [so_far + part - 2 * x.nbytes for so_far, part in zip(total, parts, strict=True)]
    total[1] += 2 * tokens * ffn * 2
    shape = replace(SHAPE, heads=heads, kv_heads=groups, head_dim=d, ffn=ffn)
    found = more_than_fused(shape, recipe(Path("unused"), model={"kernels": "plain"}, precision={"dtype": "bf16"}))
    assert (found.forward * tokens, found.backward * tokens) == pytest.approx(total, rel=0.02)


def test_what_fusing_saves_is_what_was_counted_by_hand() -> None:
    """Qwen3-32B at TP 8, 20,480 tokens, 2.8 TB/s: SwiGLU 0 and 0.09 ms, rotary positions 0.20 and 0.25, gradients 0.15."""
    spec = spec_of(parallel__tp=8, parallel__pp=1, model__kernels="plain")
    found = more_than_fused(B32, spec)
    times = [found.forward * 20480 / 2.8e9, found.backward * 20480 / 2.8e9, found.weights / 2.8e9]
    assert times == pytest.approx([0.20, 0.34, 0.15], rel=0.5) and sum(times) == pytest.approx(0.69, rel=0.2)
    assert found.seconds(H100, 20480, forwards=2, backwards=1) == pytest.approx((2 * times[0] + times[1] + times[2]) * 1e-3, rel=0.01)
    assert more_than_fused(B32, spec_of(model__kernels="auto")) == Traffic(0, 0, 0)


# ---- bytes kept


class _Norm(torch.autograd.Function):
    """A norm that keeps what CUDA's kernel does: input, weight, and one number a row."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden.float() * scale).to(hidden.dtype) * weight


def _kept(shape: Shape, spec: Any, tokens: int) -> int:
    """Bytes that the graph of a forward keeps, as on a GPU, parameters not counted."""
    varlen.install()
    attention.in_one_call = lambda query: True
    build.compiles = lambda device: True
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    [policy] = build_policy(shape, PolicyConfig.of(spec), mesh)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    at = torch.arange(8)
    request = HeadRequest(at, at, torch.ones(8), on_host=at)
    packing = PackedSequences.of([tokens // 2, tokens // 2], torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), pytest.MonkeyPatch.context() as patch:
        patch.setattr("megafork.model.policy.in_one_kernel", lambda hidden: True)
        patch.setattr(F, "rms_norm", _Norm.apply)
        policy(torch.randint(0, 500, (1, tokens)), None, None, labels=request, packed_seq_params=packing)
    return sum(storage.nbytes() for storage in storages.values())


def _kept_by_a_layer(spec: Any) -> float:
    tokens = 512
    few, many = (_kept(replace(SHAPE, layers=count), spec, tokens) for count in (2, 4))
    return (many - few) / 2 / tokens


def test_plain_layers_keep_on_a_gpu_what_the_plan_counts() -> None:
    spec = recipe(Path("unused"), precision={"dtype": "bf16"}, model={"kernels": "plain"})
    [found] = on_ranks(1, _kept_by_a_layer, spec)
    assert found == pytest.approx(layer(SHAPE, spec, "plain").total, rel=1e-3)


def test_both_kinds_keep_about_half_of_what_plain_ones_do_on_the_cpu() -> None:
    """Qwen3-32B at TP 8: about 30 kB per token and layer by hand, for 59 kB."""
    spec = spec_of(parallel__tp=8, parallel__pp=1)
    cpu, plain, fused = (layer(B32, spec, layers).total for layers in ("cpu", "plain", "fused"))
    assert cpu == pytest.approx(59e3, rel=0.02) and fused == pytest.approx(30e3, rel=0.15)
    assert plain == pytest.approx(fused, rel=0.05)
    many_ranks = spec_of(parallel__tp=4, parallel__pp=1, parallel__cp=4)
    assert layer(B32, many_ranks, "plain").attention > layer(B32, many_ranks, "fused").attention, "plain layers gather keys and values"


def test_what_fused_layers_save_and_keep_with_experts_was_counted_by_hand() -> None:
    """Qwen3-30B-A3B at TP 2, EP 8: 4 copies of a rank's tokens are sent, and 5 arrive on the busiest; a rank has 16 heads, 2 groups."""
    shape, layout = KNOWN["qwen3-30b-a3b"], {"tp": 2, "sp": True, "ep": 8}
    spec, other = (
        recipe(Path("unused"), parallel=layout, precision={"dtype": "bf16"}, model={"kernels": kind}) for kind in ("plain", "fused")
    )
    added, joined, turned = 2 * 4 * 4096, 2 * 5 * 4096, 2 * (16 + 2) * 128
    more = more_than_fused(shape, spec, sparse=True)
    assert more.forward == added + joined + (12 - 2) * turned + 2 * 2 * (5 * 4 + 2) * 128
    assert more.backward == added + joined + (14 - 2) * turned, "SwiGLU is torch.compile's in both"
    assert more_than_fused(shape, other, sparse=True) == Traffic(0, 0, 0)
    fused, plain = (layer(shape, spec, layers, sparse=True, skew=1.25).mlp for layers in ("fused", "plain"))
    # int32 for every expert twice and for how many, two for each copy that arrives; weights and mask of every expert, int64 for each copy
    assert fused - plain == (4 * (2 * 128 + 1) - 5 * 128 - 8 * 8) / 2 + 2 * 4 * 5
    dispatchers = (experts.held(shape, spec.parallel, fused=kind) for kind in (True, False))
    assert next(dispatchers) - next(dispatchers) == (4 * (2 * 128 + 1) - 8 * 8) / 2


# ---- what it is worth


def test_the_plan_says_what_fusing_is_worth() -> None:
    fused, plain = planned(gpus=64, **LONG), planned(gpus=64, model__kernels="plain", **LONG)
    assert (fused.layers, plain.layers) == ("fused", "plain") and planned(gpus=64, model__kernels="fused", **LONG).step == fused.step
    assert 1.01 < plain.step.update / fused.step.update < 1.15 and plain.step.score > fused.step.score
    assert plain.step.rollout == fused.step.rollout
    other = fused.with_other_layers
    assert other is not None and (other.step, other.peaks) == (plain.step, plain.peaks)
    numbers = json.loads(json.dumps(fused.to_dict()))
    assert numbers["layers"] == "fused"
    assert numbers["other_layers"] == {"layers": "plain", "seconds": plain.step.seconds, "peaks": plain.peaks}
    more = plain.step.seconds / fused.step.seconds - 1
    said = {"no Transformer Engine) a step takes ~{:.0%} more time": fused, "(Transformer Engine) a step takes ~{:.0%} less": plain}
    for words, plan in said.items():
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(render(plan, "the planner's table"))
        assert words.format(more) in " ".join(console.export_text().split())


def test_layers_follow_the_recipe() -> None:
    in_fp32 = planned(precision__dtype="fp32")
    assert in_fp32.layers == "plain" and in_fp32.with_other_layers is None
    ring = planned(parallel__cp=2, parallel__pp=2, parallel__cp_comm="p2p")
    assert ring.with_other_layers is not None and ring.with_other_layers.layers == "plain"
    assert layers_of(spec_of(precision__train_fp8=True)) == "fused"


def test_fused_layers_are_offered_where_plain_ones_do_not_fit() -> None:
    plain = next(
        plan
        for tokens in range(4096, 65536, 1024)
        if not (
            plan := planned(gpus=64, parallel__cp=4, model__kernels="plain", model__recompute="none", train__micro_batch_tokens=tokens)
        ).fits
    )
    assert math.isfinite(plain.step.seconds) and {"model.kernels": "fused"} in fixes(plain)
