"""Types and ranges of the fields of a model's JSON files that this tool reads.

``config.json`` is not ours: fields that we don't know are left alone, and known ones may be missing or null. Everything
behind this check may trust what is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acip_export.errors import CheckpointError

# File formats store sizes in 32 bits.
_LARGEST = 2**31 - 1
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class _Kind:
    """``expected``: in words. ``holds``: whether a value that is not null is one."""

    expected: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    # Integers beyond the range of floats are no numbers to compute with.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _is_sequence_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(map(holds, value))


_SIZE = _Kind(f"a whole number from 1 to {_LARGEST}", lambda value: _is_integer(value, 1))
_COUNT = _Kind(f"a whole number from 0 to {_LARGEST}", lambda value: _is_integer(value, 0))
_NUMBER = _Kind("a finite number", _is_number)
_POSITIVE = _Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = _Kind("a finite number that is not negative", lambda value: _is_number(value) and value >= 0)
_SHARE = _Kind("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_TEXTS = _Kind("a list of texts", lambda value: _is_sequence_of(value, lambda item: isinstance(item, str)))
_NUMBERS = _Kind("a list of finite numbers", lambda value: _is_sequence_of(value, _is_number))
_FLAGS = _Kind("a list of 0 and 1", lambda value: _is_sequence_of(value, lambda item: item in (0, 1)))
_OBJECT = _Kind("an object", lambda value: isinstance(value, Mapping))
_TOKEN = _Kind(
    "a token's number or a list of them",
    lambda value: _is_integer(value, 0) or _is_sequence_of(value, lambda item: _is_integer(item, 0)),
)
_TOKENS = {"bos_token_id": _TOKEN, "eos_token_id": _TOKEN, "pad_token_id": _TOKEN}

_FIELDS: Mapping[str, _Kind] = {
    **dict.fromkeys(
        """
        hidden_size n_embd d_model dim num_hidden_layers n_layer num_layers n_layers num_attention_heads n_head
        num_heads n_heads attention_heads num_key_value_heads num_kv_heads intermediate_size n_inner ffn_dim
        ffn_hidden_size hidden_dim max_position_embeddings n_positions seq_length head_dim vocab_size type_vocab_size
        sliding_window_pattern no_rope_layer_interval original_max_position_embeddings
        """.split(),  # noqa: SIM905
        _SIZE,
    ),
    **dict.fromkeys(("sliding_window", "max_window_layers"), _COUNT),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), _NOT_NEGATIVE),
    **dict.fromkeys(
        ("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping", "logits_scaling"),
        _POSITIVE,
    ),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "final_logit_softcapping"), _NUMBER
    ),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(
        """
        tie_word_embeddings attention_bias mlp_bias use_sliding_window use_bidirectional_attention is_causal is_decoder
        new_decoder_architecture multi_query
        """.split(),  # noqa: SIM905
        _FLAG,
    ),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation", "position_embedding_type"), _TEXT),
    **dict.fromkeys(("architectures", "layer_types"), _TEXTS),
    "no_rope_layers": _FLAGS,
    **dict.fromkeys(("rope_scaling", "rope_parameters", "text_config", "quantization_config", "id2label"), _OBJECT),
    **_TOKENS,
}
_ROPE_FIELDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(
        """
        rope_theta factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow mscale mscale_all_dim
        """.split(),  # noqa: SIM905
        _POSITIVE,
    ),
    "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _SIZE,
    **dict.fromkeys(("long_factor", "short_factor"), _NUMBERS),
    "truncate": _FLAG,
}
_GENERATION_FIELDS: Mapping[str, _Kind] = {
    **_TOKENS,
    "do_sample": _FLAG,
    "top_k": _COUNT,
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), _NOT_NEGATIVE),
}


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a field of ``config.json`` of another type than it must have, or out of its range."""
    _check(file, "", config, _FIELDS)
    if not config.get("model_type"):
        raise CheckpointError(f"{file} has no model_type, which says what kind of model this is")
    for key in ("layer_types", "no_rope_layers"):
        listed, layers = config.get(key), config.get("num_hidden_layers")
        if listed is not None and layers is not None and len(listed) != layers:
            raise CheckpointError(f"{file}: {key} lists {len(listed)} layers, num_hidden_layers is {layers}")
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(file, key, config.get(key) or {})
    text = config.get("text_config")
    if text:
        _check(file, "text_config.", text, _FIELDS)


def check_generation_config(file: Path, config: Mapping[str, Any]) -> None:
    """As :func:`check_config`, for ``generation_config.json``."""
    _check(file, "", config, _GENERATION_FIELDS)


def _check_rope(file: Path, where: str, rope: Mapping[str, Any]) -> None:
    _check(file, f"{where}.", rope, _ROPE_FIELDS)
    for key, inner in rope.items():
        if isinstance(inner, Mapping):  # by kind of layer
            _check(file, f"{where}.{key}.", inner, _ROPE_FIELDS)


def _check(file: Path, where: str, data: Mapping[str, Any], fields: Mapping[str, _Kind]) -> None:
    for name, kind in fields.items():
        value = data.get(name)
        if value is not None and not kind.holds(value):
            raise CheckpointError(f"{file}: {where}{name} is {_shown(value)}, expected {kind.expected}")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=lambda _: "…")
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
