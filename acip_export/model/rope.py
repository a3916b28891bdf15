"""The rotary embedding that a ``config.json`` asks for, in either of its layouts, as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acip_export.model.architectures import architecture_of


def rope_fields(config: Mapping[str, Any], layer_type: str = "full_attention") -> dict[str, Any]:
    """Kind and parameters of a layer's rotary embedding, under transformers' names.

    Returns:
        ``rope_type``, ``rope_theta``, ``partial_rotary_factor`` and ``original_max_position_embeddings`` are always
        there.
    """
    rotary = architecture_of(config).rotary
    default = rotary.theta
    if rotary.local_theta is not None:
        fields = dict((config.get("rope_parameters") or {}).get(layer_type) or {})
        if layer_type == "full_attention":
            fields |= config.get("rope_scaling") or {}
            theta = config.get("rope_theta")
        else:
            theta, default = config.get("rope_local_base_freq"), rotary.local_theta
    else:
        # The old key, where both are there.
        fields = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        if layer_type in (config.get("layer_types") or ()):
            fields = dict(fields.get(layer_type) or fields)
        theta = config.get("rope_theta")
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    kind = rotary.old_names.get(kind, kind)
    if fields.get("rope_theta") is None:
        fields["rope_theta"] = default if theta is None else theta
    share = fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rotates_all = kind == "default" and not rotary.rotates_parts
    if rotary.original_length is not None:
        original = config.get("original_max_position_embeddings") or rotary.original_length
    else:
        original = fields.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    return {
        **fields,
        "rope_type": kind,
        "partial_rotary_factor": 1.0 if rotates_all else share,
        "original_max_position_embeddings": original,
    }
