"""Builds a Megatron model from a model's shape, for every family in `shape/families.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megafork.model import experts, precision
from megafork.model import fused as fused_layers
from megafork.model.attention import PackedCoreAttention
from megafork.model.kernels import choose
from megafork.model.policy import Policy, RMSNorm
from megafork.model.rope import FusedRotary, PackedRotary, inverse_frequencies, softmax_scale
from megafork.parallel.mesh import Mesh
from megafork.parallel.vocab import DEFAULT_MEMORY_MB, chunk_for
from megafork.recipe import Precision, Recipe
from megafork.recipe.model import Kernels
from megafork.shape import Shape, check_layout


@dataclass(frozen=True)
class PolicyConfig:
    """How a policy computes, independent of its model and layout."""

    precision: Precision
    recompute: Literal["none", "selective", "full"] = "none"
    """As `model.recompute` in a recipe."""
    head_memory_mb: int = DEFAULT_MEMORY_MB
    """As `loss.head_memory_mb`."""
    kernels: Kernels = "auto"
    """As `model.kernels`."""

    @classmethod
    def of(cls, recipe: Recipe) -> PolicyConfig:
        return cls(recipe.precision, recipe.model.recompute, recipe.loss.head_memory_mb, recipe.model.kernels)


def compiles(device: torch.device) -> bool:
    """Whether Megatron's SwiGLU and its gradient are a kernel each, by torch.compile. On the CPU `compat/cpu.py` leaves them uncompiled."""
    return device.type == "cuda"


def transformer_config(shape: Shape, config: PolicyConfig, mesh: Mesh, *, fused: bool = False) -> TransformerConfig:
    """Megatron's own config for this model under the mesh's layout, with fused or plain layers."""
    layout = mesh.layout
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.dtype]
    own_swiglu = fused and shape.moe is None  # it would round an expert's product before the product with its weight, and keep both
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        softmax_scale=softmax_scale(shape),
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.family.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths requires it even in a dense model
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=False,  # needed only by old torch versions; the host would wait for the device at each exchange between stages
        calculate_per_token_loss=True,  # gradients are plain sums; the loss carries its own global denominator
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=compiles(mesh.device) and not own_swiglu,  # without biases: SwiGLU, or its product with an expert's weight
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        use_te_activation_func=own_swiglu,
        **experts.settings(shape, layout, fused=fused),
        **(fused_layers.settings(layout) if fused else {}),
        **precision.settings(config.precision),
        **_recompute(config),
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    """Leave the weight uninitialised: it is loaded later. `perform_initialization=False` would also skip marking them as tensor
    parallel, which would make the gradient norm wrong."""
    return weight


def _recompute(config: PolicyConfig) -> dict[str, Any]:
    if config.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def layer_spec(shape: Shape, config: TransformerConfig, vp_stage: int | None = None, *, fused: bool = False) -> TransformerBlockSubmodules:
    """The layers of one stage, or of one of its chunks, and the final norm."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    sparse = [shape.is_sparse(layer) for layer in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))]
    if fused:
        specs, norm = {kind: fused_layers.layer(shape, sparse=kind) for kind in set(sparse)}, fused_layers.final_norm()
    else:
        specs, norm = {kind: _plain_layer(shape, config, sparse=kind) for kind in set(sparse)}, RMSNorm
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in sparse], layer_norm=norm)


def _plain_layer(shape: Shape, config: TransformerConfig, *, sparse: bool) -> ModuleSpec:
    """Megatron's local spec of a layer, with experts (`sparse`) or without: with our norm (for sequence parallelism), our core attention
    (for packing and context parallelism) and, in FP8, Transformer Engine's projections."""
    family = shape.family
    spec = get_gpt_layer_local_spec(
        num_experts=shape.mixture.experts if sparse else None, qk_layernorm=family.qk_norm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.self_attention.submodules.core_attention = PackedCoreAttention
    if sparse:
        experts.route(spec)
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")  # only a dense layer's norm is fused with what follows
    modules: dict[str, type] = {rule.module: RMSNorm for rule in family.layer if rule.norm}
    if config.fp8:
        modules |= precision.projections(family)
    for name, module in modules.items():
        _replace(layer, name, module)
    return spec


def _replace(layer: Any, name: str, module: type) -> None:
    """Set the class from which a layer's submodule, such as `mlp.linear_fc1`, is built."""
    *path, last = name.split(".")
    for part in path:
        layer = getattr(layer, part).submodules
    setattr(layer, last, module)


def build_policy(shape: Shape, config: PolicyConfig, mesh: Mesh) -> list[Policy]:
    """This rank's model chunks (one, or vpp), with uninitialised weights; every rank must call.

    Load weights before building the optimizer. Raises RecipeError if the layout or this machine does not support the model, the precision
    or the kernels.
    """
    layout = mesh.layout
    check_layout(shape, layout)
    precision.check_training(shape, config.precision, layout, config.kernels)
    precision.check_machine(config.precision)
    return build_chunks(shape, config, mesh, fused=choose(config.kernels, config.precision, layout).fused)


def build_chunks(shape: Shape, config: PolicyConfig, mesh: Mesh, *, fused: bool) -> list[Policy]:
    """As `build_policy`, without its checks, with fused or plain layers."""
    layout = mesh.layout
    megatron = transformer_config(shape, config, mesh, fused=fused)
    chunks = []
    for stage in range(layout.vpp):
        first = mesh.pp_rank == 0 and stage == 0
        last = mesh.pp_rank == layout.pp - 1 and stage == layout.vpp - 1
        vp_stage = stage if layout.vpp > 1 else None
        padded = shape.padded_vocab(layout.tp)
        chunks.append(
            Policy(
                config=megatron,
                transformer_layer_spec=layer_spec(shape, megatron, vp_stage, fused=fused),
                vocab_size=padded,
                max_sequence_length=shape.max_positions,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=shape.tied,
                position_embedding_type="rope",
                vp_stage=vp_stage,
                real_vocab_size=shape.vocab,
                head_chunk=chunk_for(config.head_memory_mb, padded // layout.tp),
            )
        )
        # Megatron's own rotary embedding supports only Llama 3.1's scaling, and reads the lengths from the device in each layer
        chunks[-1].rotary_pos_emb = (FusedRotary if fused else PackedRotary)(inverse_frequencies(shape).to(mesh.device))
    return [chunk.to(mesh.device) for chunk in chunks]
