"""Reads config.json's rotary positions, in every form that transformers accepts.

transformers 4 wrote `rope_theta` and `rope_scaling`; transformers 5 writes a single `rope_parameters`. If both forms are present,
transformers 5 and vLLM use `rope_scaling`, unless it is empty, and prefer the `rope_theta` inside it to the one beside it.
"""

from __future__ import annotations

import math

from megafork.shape.config import Keys
from megafork.shape.family import Family
from megafork.shape.model import Llama3, Yarn

LONGEST = 1 << 24
"""Maximum number of positions. vLLM builds a table of all of them."""
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}
_KINDS = {"default": set[str](), "llama3": _LLAMA3, "yarn": _YARN}


def read_rope(config: Keys, family: Family, positions: int) -> tuple[float, Llama3 | Yarn | None]:
    """Theta, and the scaling of its frequencies. `positions`: max_position_embeddings. Raises RecipeError."""
    rope = _parameters(config, family)
    theta = (rope if "rope_theta" in rope else config).number("rope_theta", above=1, default=family.rope_theta)
    for keys in (config.without_null(*family.nulls), rope):
        if keys.values.get("partial_rotary_factor", 1.0) != 1.0:
            raise keys.error("partial_rotary_factor", "megafork rotates whole heads; give a model with 1.0")
    kind = _kind(rope, family)
    unknown = sorted(rope.values.keys() - _COMMON - _KINDS[kind])
    if unknown:
        raise rope.error(unknown[0], f"neither transformers nor vLLM reads it in a rope of type {kind!r}; delete the key")
    if kind == "default":
        return theta, None
    original = _original(config, rope, positions)
    return theta, _llama3(rope, original) if kind == "llama3" else _yarn(rope, original)


def _parameters(config: Keys, family: Family) -> Keys:
    scaling, parameters = config.inner("rope_scaling"), config.inner("rope_parameters")
    if not scaling.values:
        return parameters
    theta = parameters.values.get("rope_theta")
    if theta not in (None, family.rope_theta) and "rope_theta" not in scaling and "rope_theta" not in config:
        raise parameters.error(
            "rope_theta", f"rope_scaling replaces it by {family.rope_theta:g}; write the rope_theta into rope_scaling as well"
        )
    return scaling


def _kind(rope: Keys, family: Family) -> str:
    names = [rope.text(name, among=family.ropes) for name in ("rope_type", "type") if name in rope]
    if len(set(names)) > 1:
        raise rope.error("type", f"its rope_type is {names[0]!r}; delete the wrong one of the two")
    return names[0] if names else "default"


def _original(config: Keys, rope: Keys, positions: int) -> int:
    """Number of positions before scaling; a key outside the rope's object takes precedence."""
    keys = config if "original_max_position_embeddings" in config else rope
    return keys.whole("original_max_position_embeddings", largest=LONGEST, default=positions)


def _llama3(rope: Keys, original: int) -> Llama3:
    low = rope.number("low_freq_factor", above=0)
    return Llama3(rope.number("factor", above=0), low, rope.number("high_freq_factor", above=low), original)


def _yarn(rope: Keys, original: int) -> Yarn:
    given = rope.without_null("attention_factor", "mscale", "mscale_all_dim")
    factor = rope.number("factor", above=0)
    if factor < 1 or original * factor > LONGEST:
        raise rope.error("factor", f"must be at least 1, and leave no more than {LONGEST:,} positions")
    return Yarn(
        factor=factor,
        original_positions=original,
        attention_factor=_attention_factor(given, factor),
        beta_fast=given.number("beta_fast", above=0, default=32.0),
        beta_slow=given.number("beta_slow", above=0, default=1.0),
        truncate=given.flag("truncate", default=True),
    )


def _attention_factor(rope: Keys, factor: float) -> float:
    """The given factor; else 0.1 ln(factor) + 1 (the paper's section 3.4), or the quotient of two such terms, in which DeepSeek's `mscale`
    and `mscale_all_dim` multiply the 0.1."""

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0

    if "attention_factor" in rope:
        return rope.number("attention_factor", above=0)
    scales = [rope.number(name, above=0) for name in ("mscale", "mscale_all_dim") if name in rope]
    return grown(scales[0]) / grown(scales[1]) if len(scales) == 2 else grown(1.0)
