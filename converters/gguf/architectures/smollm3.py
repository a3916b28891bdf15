"""SmolLM 3: Llama without rotary embeddings in every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acip_export.errors import UnsupportedError
from acip_export.model.checkpoint import ModelShape
from converters.gguf.architectures.base import Family

# llama.cpp compiles the step in (models/smollm3.cpp).
_STEP = 4


class SmolLM3(Family):
    def check(self, config: Mapping[str, Any], shape: ModelShape) -> None:
        super().check(config, shape)
        step = int(config.get("no_rope_layer_interval") or _STEP)
        rotated = config.get("no_rope_layers") or [int((layer + 1) % step != 0) for layer in range(shape.layers)]
        if list(rotated) != [int((layer + 1) % _STEP != 0) for layer in range(shape.layers)]:
            raise UnsupportedError(
                f"llama.cpp's 'smollm3' leaves every {_STEP}th layer without rotary embedding; "
                f"config.json rotates {list(rotated)}"
            )


FAMILY = SmolLM3(name="smollm3", classes=("SmolLM3ForCausalLM",), rope_theta=2_000_000.0, interleaved_rope=True)
