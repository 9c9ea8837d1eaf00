"""The plan as tables for the terminal. Estimates are marked with ~."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megafork.plan.deadlines import HANG_S
from megafork.plan.experts import skew
from megafork.plan.fixes import fixes
from megafork.plan.hardware import (
    DECODE_SHARE,
    FP8_GAIN,
    FRAGMENTS,
    GIB,
    GPUS_PER_NODE,
    GROUPS_SAMPLED,
    LINK_SHARE,
    MATMUL_SHARE,
    RESERVED,
    STORAGE,
    VLLM_ASLEEP,
    VLLM_OVERHEAD,
)
from megafork.plan.memory import engines
from megafork.plan.planner import Plan
from megafork.plan.refit import Refit

_WHAT = {
    "rollout": "trainer's state and vLLM together",
    "update": "trainer's state and activations",
    "refit": "trainer's state, vLLM and the refit bucket",
    "cache": "vLLM's KV cache for one response of full length",
}


def render(plan: Plan, source: str, refits: Sequence[Refit] = (), proposals: Sequence[Plan] | None = None) -> RenderableType:
    """A whole plan, within 80 columns. `source`: where the model's shape comes from. `proposals`: layouts found by a search."""
    parts: list[RenderableType] = [
        _heading(plan, source),
        _state(plan),
        _phases(plan),
        Text(_what_is_counted(plan), style="dim"),
        _engine(plan),
        _times(plan),
        _layers(plan),
        Text(_assumptions(plan), style="dim"),
        _job(plan),
    ]
    parts += [_refits(refits)] if refits else []
    parts += [_proposals(proposals)] if proposals is not None else []
    parts += ["\n".join(verdict(plan))]
    spaced = [part for one in parts for part in (one, "")][:-1]
    return Group(*(Text.from_markup(part) if isinstance(part, str) else part for part in spaced))


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table with numbers right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _heading(plan: Plan, source: str) -> str:
    layout, mixture = plan.recipe.parallel, plan.shape.moe is not None
    active = f", {plan.active:,} active" if mixture else ""
    experts = f", experts ep {layout.ep} x etp {layout.expert_tp}" if mixture else ""
    return (
        f"{plan.parameters:,} parameters{active}, shape from {escape(source)}\n"
        f"{plan.gpus} x {plan.gpu.name}: tp {layout.tp} x pp {layout.pp} (vpp {layout.vpp}) x cp {layout.cp} x dp {plan.dp}{experts}, "
        f"sp {'on' if layout.sp else 'off'}, recompute {plan.recipe.model.recompute}, {plan.recipe.precision.dtype}"
        f"{', projections in FP8' if plan.recipe.precision.train_fp8 else ''}; "
        f"roll-out tp {plan.recipe.rollout.tp}"
    )


def _what_is_counted(plan: Plan) -> str:
    copies = max(stage.fp8_copies for stage in plan.stages)
    return (
        "Weights, gradients and optimizer are exact, including padding. ~ marks estimates: activations are for a micro-batch of "
        f"{plan.recipe.micro_batch_tokens:,} tokens with the head run at every position; each phase includes {_gib(RESERVED)} GiB for CUDA "
        f"and NCCL, the update {FRAGMENTS:.0%} for fragmentation and {_gib(VLLM_ASLEEP)} GiB for sleeping vLLM."
        + (f" {_what_is_routed(plan)}" if plan.shape.moe is not None else "")
        + (f" Projections in FP8 are kept twice, {_gib(copies)} GiB at most." if copies else "")
    )


def _what_is_routed(plan: Plan) -> str:
    moe, layout, busiest = plan.shape.mixture, plan.recipe.parallel, skew(plan.recipe.parallel)
    more = f", of which the busiest of {layout.ep} groups of ranks gets {busiest:g} times the mean" if layout.ep > 1 else ""
    held = max(stage.activations.routing for stage in plan.stages)
    return (
        f"Each token is {moe.per_token} copies, one for each of its experts{more}, in time as in memory; dispatchers hold {_gib(held)} GiB "
        "of the routers' choices."
    )


def _engine(plan: Plan) -> str:
    engine = plan.stages[0].engine
    return (
        f"vLLM on each GPU: {_gib(engine.weights)} GiB weights (exact) and {_gib(max(engine.cache, 0))} GiB KV cache at {engine.token:,} "
        f"bytes per token (after ~{_gib(VLLM_OVERHEAD)} GiB of overhead): {engine.concurrent} full-length responses at once on each of "
        f"{engines(plan.recipe, plan.gpus)} {'servers' if plan.recipe.rollout.servers else 'engines'}\n"
        f"refit: ~{_gib(plan.stages[0].refit_buffer)} GiB at most for the largest bucket (embedding, head or a layer)"
    )


def _state(plan: Plan) -> Table:
    rows = []
    for stage in plan.stages:
        weights = stage.weights
        sizes = (weights.weight_bytes, weights.gradient_bytes, max(weights.optimizer_bytes))
        rows.append((str(stage.stage), str(stage.layers), f"{weights.parameters:,}", *(f"{size / GIB:.2f}" for size in sizes)))
    headings = ("stage", "layers", "parameters", "weights", "gradients", "optimizer")
    return _table("permanent memory of a rank of each stage, in GiB", headings, rows)


def _phases(plan: Plan) -> Table:
    rows = []
    for stage in plan.stages:
        activations = stage.activations
        parts = (activations.kept, activations.working + activations.gather + activations.routing, activations.head)
        totals = (_marked(total, plan.gpu.memory) for total in stage.phases.values())
        rows.append((str(stage.stage), f"{activations.in_flight:g}", *map(_gib, parts), *totals))
    headings = ("stage", "in flight", "kept ~", "working ~", "head ~", *(f"{phase} ~" for phase in plan.stages[0].phases))
    return _table(f"activations, and total per phase out of {_gib(plan.gpu.memory)} GiB", headings, rows)


def _marked(size: int, most: int) -> str:
    return _gib(size) if size <= most else f"[bold red]{_gib(size)}[/]"


def _times(plan: Plan) -> Table:
    step, spec, saved = plan.step, plan.recipe, plan.saving
    rows = [
        ("roll-out", f"{step.rollout:,.0f}", f"{step.running} responses at once on an engine"),
        ("score", f"{step.score:,.0f}", "one forward" if step.score else "none: entropies and log-probs come from the roll-out"),
        ("update", f"{step.update:,.0f}", f"{spec.train.minibatches} x {step.micro_batches} micro-batches per DP rank"),
        ("refit", f"{step.refit:,.1f}", f"{_gib(plan.stages[0].engine.weights)} GiB to each GPU"),
        ("step", f"{step.seconds:,.0f}", f"{step.tokens_per_s_per_gpu:,.0f} trained tokens/s/GPU"),
        ("checkpoint", f"{saved.seconds:,.0f}", f"{_gib(saved.total)} GiB in all, {_gib(saved.host)} GiB of host memory a rank"),
    ]
    if (planning := plan.refit_planning_s) is not None:
        rows.append(("refit's plan", f"{planning:,.1f}", "once, when the run starts: timed here"))
    table = _table("a step, estimated", ("phase", "seconds ~", ""), rows)
    table.columns[2].justify = "left"
    return table


def _layers(plan: Plan) -> str:
    """What the other layers would need."""
    other = plan.with_other_layers
    if other is None:
        why = "plain, because precision.dtype is fp32" if plan.layers == "plain" else "fused, which alone have experts in FP8"
        return f"layers: {why}"
    name = {"fused": "fused ones (Transformer Engine)", "plain": "plain ones (model.kernels=plain, or no Transformer Engine)"}[other.layers]
    step = other.step.seconds / plan.step.seconds - 1
    training = (other.step.score + other.step.update) / (plan.step.score + plan.step.update) - 1
    more = "more" if training > 0 else "less"
    return (
        f"layers: {plan.layers}. With {name} a step takes ~{abs(step):.0%} {more} time, score and update ~{abs(training):.0%}, and the "
        f"update peaks at ~{_gib(other.peaks['update'])} instead of ~{_gib(plan.peaks['update'])} GiB"
    )


def _assumptions(plan: Plan) -> str:
    fp8 = f" {FP8_GAIN:g} times that in FP8," if plan.recipe.precision.train_fp8 else ""
    refills = f" {GROUPS_SAMPLED:g} groups sampled for each one kept," if plan.recipe.rollout.dynamic_sampling else ""
    return (
        f"Assumed: responses of {plan.step.response:,.0f} tokens on average, prompts of {plan.step.prompt:,.0f},{refills} "
        f"{MATMUL_SHARE:.0%} of the bf16 peak in matmuls,{fp8} {DECODE_SHARE:.0%} of the memory's bandwidth in decoding, "
        f"{LINK_SHARE:.0%} of the links', {STORAGE / 1e9:g} GB/s from a node to the file system. The step does not include rewards, "
        "evaluation and checkpoints."
    )


def _job(plan: Plan) -> str:
    needs = plan.deadlines
    hang = f"; [bold red]set MEGAFORK_HANG_S={needs.hang}[/] or more" if needs.hang > HANG_S else ""
    return (
        f"in a batch job: asked to stop {needs.warning:,} s before its end; silent for ~{needs.quiet:,.0f} s in the {needs.quiet_phase} "
        f"(MEGAFORK_HANG_S is {HANG_S:,} by default{hang})"
    )


def _refits(refits: Sequence[Refit]) -> RenderableType:
    """Data moved between ranks and nodes by megafork's plan and by a full gather, next to the lower bound."""
    rows = []
    for refit in refits:
        methods = (refit.plan, refit.least, refit.gather)
        received = (f"{method.received * refit.width / 1e9:,.1f}" for method in methods)
        between = (f"{method.between_nodes * refit.width / 1e9:,.0f}" for method in methods)
        rows.append((refit.name, *received, *between))
    headings = ("from, to", *(f"{what}\n{method}" for what in ("a rank", "nodes") for method in ("plan", "least", "gather")))
    note = (
        f"a rank: most received by any rank. nodes: total between nodes of {GPUS_PER_NODE} GPUs. plan: megafork's transfers. "
        "least: the lower bound. gather: every rank gathers every whole tensor."
    )
    return Group(_table(f"a refit on {refits[0].gpus} GPUs, in GB, exact", headings, rows), Text(note, style="dim"))


def _proposals(plans: Sequence[Plan]) -> RenderableType:
    if not plans:
        return Text("no layout fits with room to spare: give more GPUs, or a shorter rollout.max_response_length")
    mixture = plans[0].shape.moe is not None
    headings = (
        "tp",
        "pp",
        "vpp",
        "cp",
        "sp",
        *(["ep"] if mixture else []),
        "dp",
        "recompute",
        "vLLM",
        "GiB ~",
        "step s ~",
        "tokens/s/GPU ~",
    )
    rows = []
    for plan in plans:
        layout, step = plan.recipe.parallel, plan.step
        sizes = (layout.tp, layout.pp, layout.vpp, layout.cp, "on" if layout.sp else "off", *([layout.ep] if mixture else []), plan.dp)
        share, fullest = f"{plan.recipe.rollout.gpu_memory_fraction:.0%}", _gib(max(plan.peaks.values()))
        rows.append(
            (*map(str, sizes), plan.recipe.model.recompute, share, fullest, f"{step.seconds:,.0f}", f"{step.tokens_per_s_per_gpu:,.0f}")
        )
    return _table("layouts that fit, fastest estimate first", headings, rows)


def verdict(plan: Plan) -> list[str]:
    """Whether the plan fits or, if not, what does not fit and how to fix it; lines with rich markup."""
    if plan.fits:
        phase, peak = max(plan.peaks.items(), key=lambda item: item[1])
        return [f"[green]fits[/]: the peak is in the {phase}, {_gib(peak)} of {_gib(plan.gpu.memory)} GiB"]
    lines = [f"[bold red]does not fit[/]: {_WHAT[phase]}: {_gib(bytes_)} GiB too much" for phase, bytes_ in plan.over.items()]
    found = [", ".join(f"{name}={str(value).lower()}" for name, value in changes.items()) for changes in fixes(plan)]
    advice = f"any one of these makes it fit: {'; '.join(found)}" if found else "no two keys make it fit: see --search, or give more GPUs"
    return [*lines, advice]


def _gib(bytes_: float) -> str:
    return f"{bytes_ / GIB:.1f}"
