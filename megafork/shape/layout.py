"""Checks the layouts into which a model can be split, for training and for roll-outs, and assigns layers to pipeline stages."""

from __future__ import annotations

from megafork.recipe import Key, Parallel, RecipeError
from megafork.shape.model import Shape


def check_world(layout: Parallel, ranks: int) -> None:
    """Refuse a number of ranks that is not a multiple of the layout's size."""
    if ranks % layout.model_size:
        raise RecipeError(
            f"parallel.tp x pp x cp is {layout.tp} x {layout.pp} x {layout.cp} = {layout.model_size}, which does not divide the {ranks} "
            "ranks: start a multiple of it (run.ranks), or choose a smaller layout"
        )
    experts = layout.ep * layout.expert_tp
    if ranks // layout.pp % experts:
        raise RecipeError(
            f"parallel.ep x etp is {layout.ep} x {layout.expert_tp} = {experts}, which does not divide the {ranks // layout.pp} ranks of a "
            f"pipeline stage: start a multiple of {layout.smallest_world} ranks (run.ranks), or choose a smaller ep or etp"
        )


def check_engines(rollout_tp: int, ranks: int) -> None:
    """Refuse roll-out engines that do not share the ranks evenly."""
    if ranks % rollout_tp:
        raise RecipeError(Key("rollout.tp"), f" is {rollout_tp}, which does not divide the {ranks} ranks: choose one that does")


def check_rollout_tp(shape: Shape, tp: int, *, whole_experts: bool = False) -> None:
    """Refuse a number of ranks per engine that does not divide the attention heads, nor what they split or share of the experts, and a
    model whose head_dim vLLM would misread."""
    if shape.heads % tp:
        raise RecipeError(Key("rollout.tp"), f" is {tp} but the model has {shape.heads} attention heads: choose a tp that divides them")
    if whole_experts and shape.moe is None:
        raise RecipeError("rollout.whole_experts is true but the model is dense, it has no experts: leave it out")
    if shape.moe is not None and whole_experts and shape.moe.experts % tp:
        raise RecipeError(
            Key("rollout.tp"), f" is {tp} but the model has {shape.moe.experts} experts to share: choose a tp that divides them"
        )
    if shape.moe is not None and not whole_experts and shape.moe.ffn % tp:
        raise RecipeError(
            Key("rollout.tp"), f" is {tp} but the model's moe_intermediate_size is {shape.moe.ffn}: choose a tp that divides it"
        )
    if not shape.family.vllm_reads_head_dim and shape.head_dim * shape.heads != shape.hidden:
        raise RecipeError(
            f"the model's head_dim is {shape.head_dim}: vLLM knows a {shape.architecture} only with hidden_size / num_attention_heads = "
            f"{shape.hidden / shape.heads:g}; give another model"
        )


def stage_layers(layers: int, layout: Parallel) -> list[int]:
    """Number of layers in each pipeline stage: first and last as given, the rest divided equally (rounded down: see `check_layout`)."""
    given = {0: layout.first_stage_layers, layout.pp - 1: layout.last_stage_layers}
    fixed = {stage: count for stage, count in given.items() if count is not None}
    rest = (layers - sum(fixed.values())) // max(layout.pp - len(fixed), 1)
    return [fixed.get(stage, rest) for stage in range(layout.pp)]


def stage_of_layer(layers: int, layout: Parallel) -> list[int]:
    """The pipeline stage that holds each layer. With vpp, the layers cycle through the stages vpp times."""
    counts = stage_layers(layers, layout)
    return [stage for _ in range(layout.vpp) for stage, count in enumerate(counts) for _ in range(count // layout.vpp)]


def check_layout(shape: Shape, layout: Parallel) -> None:
    """Refuse a layout into which this model cannot be split. Raises RecipeError with the reason."""
    if shape.heads % layout.tp:
        raise RecipeError(
            Key("parallel.tp"), f" is {layout.tp} but the model has {shape.heads} attention heads: choose a tp that divides them"
        )
    if max(shape.kv_heads, layout.tp) % min(shape.kv_heads, layout.tp):
        raise RecipeError(
            Key("parallel.tp"), f" is {layout.tp} but the model has {shape.kv_heads} key-value heads: one must be a multiple of the other"
        )
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if rows % layout.tp:
        raise RecipeError(
            Key("parallel.tp"), f" is {layout.tp} but the model's queries, keys and values have {rows} rows: choose a tp that divides them"
        )
    sizes = {"hidden_size": shape.hidden}
    if shape.has_mlp:
        sizes["intermediate_size"] = shape.ffn
    for name, size in sizes.items():
        if size % layout.tp:
            raise RecipeError(Key("parallel.tp"), f" is {layout.tp} but the model's {name} is {size}: choose a tp that divides it")
    _check_experts(shape, layout)
    groups = max(shape.kv_heads // layout.tp, 1)
    if layout.cp_comm == "a2a" and groups % layout.cp:
        raise RecipeError(
            f"parallel.cp_comm is a2a but at parallel.tp={layout.tp} a rank has {groups} key-value heads, which "
            f"parallel.cp={layout.cp} does not divide: set cp_comm=p2p, or choose a smaller tp or cp"
        )
    counts = stage_layers(shape.layers, layout)
    if min(counts) < 1 or sum(counts) != shape.layers or any(count % layout.vpp for count in counts):
        given = {"first_stage_layers": layout.first_stage_layers, "last_stage_layers": layout.last_stage_layers, "vpp": layout.vpp}
        rest = "".join(f", {name} {value}" for name, value in given.items() if value not in (None, 1))
        raise RecipeError(
            Key("parallel.pp"),
            f" is {layout.pp}{rest}, but the model has {shape.layers} layers: each stage needs equally many in each of its vpp "
            "parts, and all stages but the first and the last equally many; choose other numbers",
        )


def check_length(shape: Shape, tokens: int) -> None:
    """Refuse roll-outs of which prompt and response together are longer than the model's positions."""
    if tokens > shape.max_positions:
        raise RecipeError(
            f"data.max_prompt_length + rollout.max_response_length is {tokens} but the model knows {shape.max_positions} positions "
            "(max_position_embeddings, extended by YaRN if set): shorten one of them"
        )


def _check_experts(shape: Shape, layout: Parallel) -> None:
    """Refuse a layout into which this model's experts cannot be split, and one with ep for a model without experts."""
    if shape.moe is None:
        if layout.ep > 1:
            raise RecipeError(Key("parallel.ep"), f" is {layout.ep} but the model is dense, it has no experts: set parallel.ep=1")
        return
    if layout.tp > 1 and not layout.sp:
        raise RecipeError(
            Key("parallel.tp"),
            f" is {layout.tp} without parallel.sp: Megatron's experts need each token on one TP rank only; set parallel.sp=true",
        )
    if shape.moe.experts % layout.ep:
        raise RecipeError(
            Key("parallel.ep"), f" is {layout.ep} but the model has {shape.moe.experts} experts: choose an ep that divides them"
        )
    if shape.moe.ffn % layout.expert_tp:
        key = Key("parallel.tp" if layout.ep == 1 else "parallel.etp")
        raise RecipeError(
            key, f" is {layout.expert_tp} but the model's moe_intermediate_size is {shape.moe.ffn}: choose one that divides it"
        )
