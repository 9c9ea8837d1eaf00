"""Reads a model's shape from config.json. A key that is neither read nor known to have no effect is refused, never ignored."""

from __future__ import annotations

import os
from pathlib import Path

from megafork.recipe import Key, RecipeError
from megafork.shape import experts
from megafork.shape.config import Keys, read_config
from megafork.shape.families import FAMILIES
from megafork.shape.family import Family
from megafork.shape.model import Shape
from megafork.shape.rope import LONGEST, read_rope

_READ = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "dtype", "torch_dtype"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"),
    *("layer_types", "sliding_window", "quantization_config"),
}
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "use_sliding_window": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
}
"""Keys with the only value that megafork supports, which is also their default. Family-specific ones are in `families.py`."""
_WITHOUT_EFFECT = {
    # in any config that transformers writes or used to write
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "initializer_range", "use_cache", "pretraining_tp"),
    *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "is_decoder", "torchscript", "use_bfloat16"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "gradient_checkpointing"),
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class", "prefix"),
    *("tf_legacy_loss", "max_window_layers"),
    # from individual models and tools
    *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
    # for the tokenizer and for generation
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values"),
    *("exponential_decay_length_penalty",),
}
_QUANTIZED = "hf_quant_config.json"
DTYPES = ("float32", "bfloat16", "float16")
_LARGEST_SIZE = 1 << 24
_MOST_LAYERS = 4096
_LARGEST_HEAD = 4096


def read_shape(folder: Path) -> Shape:
    """The shape that a Hugging Face folder's config.json describes, as transformers and vLLM read it.

    Raises RecipeError for a folder without config.json, an unknown architecture, or anything that megafork does not support.
    """
    config = Keys(read_config(folder), folder)
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _refuse_what_differs(config, family)
    hidden, heads = (config.whole(key, largest=_LARGEST_SIZE) for key in ("hidden_size", "num_attention_heads"))
    layers = config.whole("num_hidden_layers", largest=_MOST_LAYERS)
    _refuse_other_layers(config, layers)
    positions = config.whole("max_position_embeddings", largest=LONGEST, default=family.positions)
    theta, scaling = read_rope(config, family, positions)
    longest = getattr(scaling, "positions", positions)
    _refuse_windows(config, family, longest)
    return Shape(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        ffn=config.whole("intermediate_size", largest=_LARGEST_SIZE),
        heads=heads,
        kv_heads=_kv_heads(config, family, heads),
        head_dim=_head_dim(config, family, hidden, heads),
        vocab=config.whole("vocab_size", largest=_LARGEST_SIZE),
        tied=config.flag("tie_word_embeddings", default=False),
        norm_eps=config.number("rms_norm_eps", above=0, below=1, default=family.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=longest,
        moe=experts.read_mixture(config, layers) if family.experts else None,
    )


def read_dtype(folder: Path) -> str | None:
    """The dtype of the weights, by torch's name, as given in config.json; None if it gives none. Raises RecipeError."""
    config = Keys(read_config(folder), folder)
    told = [config.text(key, among=DTYPES) for key in ("dtype", "torch_dtype") if config.values.get(key) is not None]
    return told[0] if told else None


def _architecture(config: Keys) -> str:
    named = config.values.get("architectures")
    architecture = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        what = architecture if isinstance(architecture, str) else f"model with architectures {named!r:.80}"
        raise RecipeError(Key("model.path"), f" is {str(config.folder)!r}, a {what}: megafork trains {', '.join(FAMILIES)}")
    if config.values.get("model_type") != FAMILIES[architecture].model_type:  # transformers chooses the model by it
        raise config.error("model_type", f"that of a {architecture} is {FAMILIES[architecture].model_type!r}; give a folder of one model")
    return architecture


def _refuse_what_differs(config: Keys, family: Family) -> None:
    """Refuse quantised weights, unsupported values and unknown keys. Raises RecipeError."""
    beside = os.path.exists(config.folder / _QUANTIZED)  # vLLM looks there too
    if config.values.get("quantization_config") is not None or beside:
        what = _QUANTIZED if beside else "quantization_config"
        raise RecipeError(
            Key("model.path"),
            f" is {str(config.folder)!r}: it is quantised ({what}); give the model it was made from, or delete {what} where the "
            "weights are quantised no longer",
        )
    fixed = {**_FIXED, **family.fixed}
    known = _READ | _WITHOUT_EFFECT | set(family.ignored) | (experts.KEYS if family.experts else set())
    for key, value in config.values.items():
        if key in fixed:
            wanted = fixed[key]
            if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
                raise config.error(key, f"megafork trains models with {wanted!r}; give another model")
        elif key not in known and value is not None:
            raise config.error(key, "megafork does not know what it changes; delete the key from config.json if it changes nothing")
    for key in family.counts:
        if key in config:
            config.whole(key, largest=LONGEST)


def _refuse_windows(config: Keys, family: Family, positions: int) -> None:
    """Refuse a sliding window that hides any position. Raises RecipeError."""
    if family.window == "off" or config.values.get("sliding_window", family.sliding_window) is None:
        return
    if family.window == "refused":
        raise config.error("sliding_window", "vLLM would attend to a window, transformers to everything; set it to null")
    absent = "sliding_window" not in config
    window = config.whole("sliding_window", largest=LONGEST, default=family.sliding_window)
    if window < positions:
        told = f"transformers takes {window} where it is left out, " if absent else ""
        raise config.error(
            "sliding_window",
            f"{told}fewer than the {positions:,} positions, and megafork attends to them all; give a model that was trained without (null)",
        )


def _refuse_other_layers(config: Keys, layers: int) -> None:
    types = config.values.get("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        raise config.error("layer_types", f"megafork trains models of 'full_attention' in each of the {layers} layers; give another model")


def _kv_heads(config: Keys, family: Family, heads: int) -> int:
    absent = "num_key_value_heads" not in config
    kv_heads = config.without_null(*family.nulls).whole(
        "num_key_value_heads", largest=_LARGEST_SIZE, default=family.kv_heads if absent and family.kv_heads else heads
    )
    if heads % kv_heads:
        told = f"transformers takes {kv_heads} where it is left out" if absent else "it must divide them"
        raise config.error("num_key_value_heads", f"the model has {heads} attention heads; {told}")
    return kv_heads


def _head_dim(config: Keys, family: Family, hidden: int, heads: int) -> int:
    config = config.without_null(*family.nulls)
    derived = family.head_dim is None and "head_dim" not in config
    if hidden % heads and (derived or family.whole_heads):
        raise config.error("hidden_size", f"must be a multiple of num_attention_heads, {heads}")
    head_dim = config.whole("head_dim", largest=_LARGEST_HEAD, default=family.head_dim or hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", f"a head has {head_dim} dimensions; rotary positions turn pairs, an even number is needed")
    return head_dim
