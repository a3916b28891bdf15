"""Granite 3: Llama with multipliers on embedding, attention, residual stream and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acip_export.model.shape import ModelShape
from converters.gguf.architectures.base import ATTENTION_BIASES, FFN_BIASES, Family
from converters.gguf.writer import Value, float32

_MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


class Granite(Family):
    def own_keys(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, Value]:
        del shape
        return {key: float32(float(config.get(name, 1.0))) for key, name in _MULTIPLIERS.items()}


FAMILY = Granite(
    name="granite",
    model_types=("granite",),
    factor_pairs=True,
    optional=(*ATTENTION_BIASES, *FFN_BIASES),
    rope_kinds=("default", "linear", "llama3", "yarn", "longrope"),
    interleaved_rope=True,
)
