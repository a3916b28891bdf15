"""The rotary embedding that a ``config.json`` asks for, in either of its layouts, as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Families with rotary embeddings of their own for windowed layers.
_BY_KIND_OF_LAYER = frozenset({"gemma3_text"})
# Families that leave a part of each head unrotated where nothing scales the positions; others rotate all of it.
_ROTATES_PARTS = frozenset({"phi3"})
# Where this is a field of the configuration it replaces what stands beside the factors. Its default there.
_ORIGINAL_LENGTH = {"phi3": 4096}
# What Phi 3's first configurations called it.
_OLD_NAMES = {"phi3": {"yarn": "longrope"}}


def rope_fields(config: Mapping[str, Any], layer_type: str = "full_attention") -> dict[str, Any]:
    """Kind and parameters of a layer's rotary embedding, under transformers' names.

    Returns:
        ``rope_type``, ``partial_rotary_factor`` and ``original_max_position_embeddings`` are always there;
        ``rope_theta`` unless the family's default holds.
    """
    family = str(config.get("model_type"))
    if family in _BY_KIND_OF_LAYER:
        fields = dict((config.get("rope_parameters") or {}).get(layer_type) or {})
        if layer_type == "full_attention":
            fields |= config.get("rope_scaling") or {}
        theta = config.get("rope_theta" if layer_type == "full_attention" else "rope_local_base_freq")
    else:
        # The old key, where both are there.
        fields = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        if layer_type in (config.get("layer_types") or ()):
            fields = dict(fields.get(layer_type) or fields)
        theta = config.get("rope_theta")
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    kind = _OLD_NAMES.get(family, {}).get(kind, kind)
    if fields.get("rope_theta") is None and theta is not None:
        fields["rope_theta"] = theta
    share = fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rotates_all = kind == "default" and family not in _ROTATES_PARTS
    if family in _ORIGINAL_LENGTH:
        original = config.get("original_max_position_embeddings") or _ORIGINAL_LENGTH[family]
    else:
        original = fields.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    return {
        **fields,
        "rope_type": kind,
        "partial_rotary_factor": 1.0 if rotates_all else share,
        "original_max_position_embeddings": original,
    }
