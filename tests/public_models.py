"""config.json of public models, with the keys and values as published."""

from __future__ import annotations

from typing import Any

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
_QWEN3 = {
    **_QWEN,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_QWEN2 = {**_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 28, "transformers_version": "4.43.1"}
_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA = {**_LLAMA2, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "torch_dtype": "bfloat16"}
_LLAMA3 = {**_LLAMA, "bos_token_id": 128000, "eos_token_id": 128001, "rope_theta": 500000.0, "vocab_size": 128256}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 131072,
}
_PHI4 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {},
    "bos_token_id": 100257,
    "embd_pdrop": 0.0,
    "eos_token_id": 100265,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": 100349,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 100352,
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, positions: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


def _model(family: dict[str, Any], sizes: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {**family, **sizes, **rest}


_QWEN_7B = (3584, 18944, 28, 28, 4)
_LLAMA_1B = _sizes(2048, 8192, 16, 32, 8, 131072, tied=True)
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _model(_QWEN3, _sizes(1024, 3072, 28, 16, 8, 40960, tied=True), max_window_layers=28),
    "Qwen3-8B": _model(_QWEN3, _sizes(4096, 12288, 36, 32, 8, 40960), max_window_layers=36),
    "Qwen3-8B-Base": _model(_QWEN3, _sizes(4096, 12288, 36, 32, 8, 32768), max_window_layers=36, eos_token_id=151643),
    "Qwen3-14B": _model(_QWEN3, _sizes(5120, 17408, 40, 40, 8, 40960), max_window_layers=40),
    "Qwen3-32B": _model(_QWEN3, _sizes(5120, 25600, 64, 64, 8, 40960), max_window_layers=64),
    "Qwen3-32B with YaRN, by its card": _model(_QWEN3, _sizes(5120, 25600, 64, 64, 8, 40960), max_window_layers=64, rope_scaling=YARN),
    "Qwen2.5-7B": _model(_QWEN2, _sizes(*_QWEN_7B, 131072), rope_theta=1000000.0, sliding_window=131072, use_mrope=False),
    "Qwen2.5-7B-Instruct": _model(_QWEN2, _sizes(*_QWEN_7B, 32768), rope_theta=1000000.0, sliding_window=131072),
    "Qwen2.5-Math-7B": _model(_QWEN2, _sizes(*_QWEN_7B, 4096), rope_theta=10000, sliding_window=4096, use_mrope=False),
    "Qwen2.5-7B-Instruct with YaRN, by its card": _model(
        _QWEN2,
        _sizes(*_QWEN_7B, 32768),
        rope_theta=1000000.0,
        sliding_window=131072,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "DeepSeek-R1-Distill-Qwen-7B": _model(
        _QWEN2, _sizes(*_QWEN_7B, 131072), rope_theta=10000, sliding_window=4096, use_mrope=False, vocab_size=152064
    ),
    "Llama-2-7b": _model(_LLAMA2, _sizes(4096, 11008, 32, 32, 32, 4096), _name_or_path="meta-llama/Llama-2-7b-hf"),
    "Meta-Llama-3-8B": _model(_LLAMA3, _sizes(4096, 14336, 32, 32, 8, 8192)),
    "Llama-3.1-8B-Instruct": _model(
        _LLAMA3, _sizes(4096, 14336, 32, 32, 8, 131072), eos_token_id=[128001, 128008, 128009], rope_scaling=LLAMA3
    ),
    "DeepSeek-R1-Distill-Llama-8B": _model(_LLAMA3, _sizes(4096, 14336, 32, 32, 8, 131072), rope_scaling=LLAMA3),
    "Llama-3.2-1B": _model(_LLAMA3, _LLAMA_1B, head_dim=64, rope_scaling={**LLAMA3, "factor": 32.0}),
    "unsloth/Llama-3.2-1B-Instruct": _model(
        _LLAMA3,
        _LLAMA_1B,
        head_dim=64,
        rope_scaling={**LLAMA3, "factor": 32.0},
        pad_token_id=128004,
        unsloth_fixed=True,
        unsloth_version="2025.3.5",
    ),
    "TinyLlama-1.1B-Chat": _model(_LLAMA, _sizes(2048, 5632, 22, 32, 4, 2048), rope_theta=10000.0),
    "SmolLM2-135M-Instruct": _model(
        _LLAMA,
        _sizes(576, 1536, 30, 9, 3, 8192, tied=True),
        is_llama_config=True,
        rope_interleaved=False,
        rope_theta=100000,
        vocab_size=49152,
        pad_token_id=2,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    ),
    "Qwen3-30B-A3B": _model(_MOE, _sizes(2048, 6144, 48, 32, 4, 40960), head_dim=128, moe_intermediate_size=768),
    "Qwen3-235B-A22B": _model(_MOE, _sizes(4096, 12288, 94, 64, 4, 40960), head_dim=128, moe_intermediate_size=1536),
    "Mistral-7B-Instruct-v0.2": _model(_MISTRAL, _sizes(4096, 14336, 32, 32, 8, 32768), vocab_size=32000),
    "Mistral-7B-Instruct-v0.3": _model(_MISTRAL, _sizes(4096, 14336, 32, 32, 8, 32768), vocab_size=32768),
    "Mistral-Nemo-Base-2407": _model(_MISTRAL, _sizes(5120, 14336, 40, 32, 8, 128000), head_dim=128),
    "Mistral-Small-24B-Base-2501": _model(_MISTRAL, _sizes(5120, 32768, 40, 32, 8, 32768), head_dim=128, rope_theta=100000000.0),
    "phi-4": _model(_PHI4, _sizes(5120, 17920, 40, 40, 10, 16384), original_max_position_embeddings=16384, rope_theta=250000),
    "Phi-4-reasoning": _model(_PHI4, _sizes(5120, 17920, 40, 40, 10, 32768), original_max_position_embeddings=32768, rope_theta=500000),
    "of transformers 4.30, with all that it wrote": _model(
        _LLAMA2,
        _sizes(2048, 5632, 22, 32, 4, 2048),
        return_dict=True,
        output_hidden_states=False,
        output_attentions=False,
        torchscript=False,
        use_bfloat16=False,
        tf_legacy_loss=False,
        pruned_heads={},
        chunk_size_feed_forward=0,
        is_encoder_decoder=False,
        is_decoder=False,
        cross_attention_hidden_size=None,
        add_cross_attention=False,
        tie_encoder_decoder=False,
        max_length=20,
        min_length=0,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        id2label={"0": "LABEL_0", "1": "LABEL_1"},
        label2id={"LABEL_0": 0, "LABEL_1": 1},
        finetuning_task=None,
        problem_type=None,
        tokenizer_class=None,
        decoder_start_token_id=None,
    ),
}
