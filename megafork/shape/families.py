"""The table of model families: all that megafork knows about their config.json and tensors. docs/extending.md explains how to add one."""

from __future__ import annotations

from megafork.shape.family import Axis, Family, HFTensor, Kind, Rule

# ---- rows and columns

_HIDDEN = Axis("hidden", lambda shape: shape.hidden)
_HEAD_DIM = Axis("a head", lambda shape: shape.head_dim)
_QUERIES = Axis("queries", lambda shape: shape.heads * shape.head_dim, "evenly")
_KEYS = Axis("keys", lambda shape: shape.kv_heads * shape.head_dim, "by KV head")
_VALUES = Axis("values", lambda shape: shape.kv_heads * shape.head_dim, "by KV head")
_GATE = Axis("gate", lambda shape: shape.ffn, "evenly")
_UP = Axis("up", lambda shape: shape.ffn, "evenly")
_FFN = Axis("the MLP", lambda shape: shape.ffn, "evenly")
_EXPERTS = Axis("experts", lambda shape: shape.mixture.experts)
_EXPERT_GATE = Axis("gate", lambda shape: shape.mixture.ffn, "evenly")
_EXPERT_UP = Axis("up", lambda shape: shape.mixture.ffn, "evenly")
_EXPERT_FFN = Axis("an expert", lambda shape: shape.mixture.ffn, "evenly")
_VOCABULARY = Axis("vocabulary", lambda shape: shape.vocab, "padded")

# ---- parameters that families share


def _norm(megatron: str, huggingface: str, axis: Axis = _HIDDEN, fused: str | None = None) -> Rule:
    return Rule(megatron, "replicated", (HFTensor(huggingface, (axis,)),), fused=fused, norm=True)


def _projection(megatron: str, kind: Kind, *tensors: HFTensor, fused: str | None = None) -> Rule:
    return Rule(megatron, kind, tensors, fused=fused, fp8=True)


_EMBEDDING = Rule("embedding.word_embeddings.weight", "vocab", (HFTensor("model.embed_tokens.weight", (_VOCABULARY,), _HIDDEN),))
_FINAL_NORM = _norm("decoder.final_layernorm.weight", "model.norm.weight")
_HEAD = Rule("output_layer.weight", "vocab", (HFTensor("lm_head.weight", (_VOCABULARY,), _HIDDEN),))

_INPUT_NORM = _norm("input_layernorm.weight", "input_layernorm.weight", fused="self_attention.linear_qkv.layer_norm_weight")
_PROJ = _projection("self_attention.linear_proj.weight", "row", HFTensor("self_attn.o_proj.weight", (_HIDDEN,), _QUERIES))
_QKV = _projection(
    "self_attention.linear_qkv.weight",
    "qkv",
    HFTensor("self_attn.q_proj.weight", (_QUERIES,), _HIDDEN),
    HFTensor("self_attn.k_proj.weight", (_KEYS,), _HIDDEN),
    HFTensor("self_attn.v_proj.weight", (_VALUES,), _HIDDEN),
)
_QKV_BIAS = Rule(
    "self_attention.linear_qkv.bias",
    "qkv",
    (
        HFTensor("self_attn.q_proj.bias", (_QUERIES,)),
        HFTensor("self_attn.k_proj.bias", (_KEYS,)),
        HFTensor("self_attn.v_proj.bias", (_VALUES,)),
    ),
)
_Q_NORM = _norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", _HEAD_DIM)
_K_NORM = _norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", _HEAD_DIM)
_MLP_NORM = _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", fused="mlp.linear_fc1.layer_norm_weight")
_FC1 = _projection(
    "mlp.linear_fc1.weight",
    "gated",
    HFTensor("mlp.gate_proj.weight", (_GATE,), _HIDDEN),
    HFTensor("mlp.up_proj.weight", (_UP,), _HIDDEN),
)
_FC2 = _projection("mlp.linear_fc2.weight", "row", HFTensor("mlp.down_proj.weight", (_HIDDEN,), _FFN))

# Megatron never fuses the norm into experts
_EXPERTS_NORM = _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
_ROUTER = Rule("mlp.router.weight", "replicated", (HFTensor("mlp.gate.weight", (_EXPERTS,), _HIDDEN),))
_EXPERT_FC1 = _projection(
    "mlp.experts.local_experts.*.linear_fc1.weight",
    "gated",
    HFTensor("mlp.experts.*.gate_proj.weight", (_EXPERT_GATE,), _HIDDEN),
    HFTensor("mlp.experts.*.up_proj.weight", (_EXPERT_UP,), _HIDDEN),
    fused="mlp.experts.linear_fc1.weight*",
)
_EXPERT_FC2 = _projection(
    "mlp.experts.local_experts.*.linear_fc2.weight",
    "row",
    HFTensor("mlp.experts.*.down_proj.weight", (_HIDDEN,), _EXPERT_FFN),
    fused="mlp.experts.linear_fc2.weight*",
)

# ---- the families

FAMILIES = {
    "Qwen3ForCausalLM": Family(
        "qwen3",
        "Qwen3 (dense)",
        embedding=_EMBEDDING,
        layer=(_INPUT_NORM, _PROJ, _QKV, _Q_NORM, _K_NORM, _MLP_NORM, _FC1, _FC2),
        final_norm=_FINAL_NORM,
        head=_HEAD,
        positions=32768,
        kv_heads=32,
        head_dim=128,
        window="off",
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        embedding=_EMBEDDING,
        layer=(_INPUT_NORM, _PROJ, _QKV, _Q_NORM, _K_NORM, _MLP_NORM, _FC1, _FC2),
        sparse_layer=(_INPUT_NORM, _PROJ, _QKV, _Q_NORM, _K_NORM, _EXPERTS_NORM, _ROUTER),
        experts=(_EXPERT_FC1, _EXPERT_FC2),
        final_norm=_FINAL_NORM,
        head=_HEAD,
        positions=32768,
        kv_heads=4,
        window="off",
        nulls=("partial_rotary_factor",),
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        "Qwen2.5, DeepSeek-R1-Distill-Qwen",
        embedding=_EMBEDDING,
        layer=(_INPUT_NORM, _PROJ, _QKV, _QKV_BIAS, _MLP_NORM, _FC1, _FC2),
        final_norm=_FINAL_NORM,
        head=_HEAD,
        positions=32768,
        kv_heads=32,
        window="off",
        vllm_reads_head_dim=False,
    ),
    "LlamaForCausalLM": Family(
        "llama",
        "Llama 2 and 3, SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama",
        embedding=_EMBEDDING,
        layer=(_INPUT_NORM, _PROJ, _QKV, _MLP_NORM, _FC1, _FC2),
        final_norm=_FINAL_NORM,
        head=_HEAD,
        positions=2048,
        nulls=("num_key_value_heads", "head_dim", "partial_rotary_factor"),
        whole_heads=True,
    ),
    "MistralForCausalLM": Family(
        "mistral",
        "Mistral 7B from v0.2 on, Mistral Nemo, Mistral Small 2409 and 2501",
        embedding=_EMBEDDING,
        layer=(_INPUT_NORM, _PROJ, _QKV, _MLP_NORM, _FC1, _FC2),
        final_norm=_FINAL_NORM,
        head=_HEAD,
        positions=131072,
        kv_heads=8,
        nulls=("head_dim", "partial_rotary_factor"),
        window="on",
        sliding_window=4096,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        "Phi-4, Phi-4-reasoning",
        embedding=_EMBEDDING,
        layer=(
            _INPUT_NORM,
            _PROJ,
            _projection(
                "self_attention.linear_qkv.weight", "qkv", HFTensor("self_attn.qkv_proj.weight", (_QUERIES, _KEYS, _VALUES), _HIDDEN)
            ),
            _MLP_NORM,
            _projection("mlp.linear_fc1.weight", "gated", HFTensor("mlp.gate_up_proj.weight", (_GATE, _UP), _HIDDEN)),
            _FC2,
        ),
        final_norm=_FINAL_NORM,
        head=_HEAD,
        positions=4096,
        nulls=("num_key_value_heads",),
        norm_eps=1e-5,
        window="on",
        ropes=("default",),
        fixed={"resid_pdrop": 0, "embd_pdrop": 0},
        ignored=("auto_map",),
        counts=("original_max_position_embeddings",),
    ),
}
"""Families, keyed by config.json's `architectures`."""

_UNFUSED = {rule.fused: rule.megatron for family in FAMILIES.values() for rule in (*family.layer, *family.experts) if rule.fused}


def unfused(name: str) -> str:
    """What plain layers call the parameter of a layer that fused ones call `name`."""
    of_experts = name.rstrip("0123456789")
    plain = _UNFUSED.get(name) or _UNFUSED.get(f"{of_experts}*", name)
    return plain.replace("*", name.removeprefix(of_experts))
