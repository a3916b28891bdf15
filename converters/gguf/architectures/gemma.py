"""Gemma 1, 2 and 3 (text): norms that add one, soft caps, windowed layers, a query scale of their own.

llama.cpp scales the embedding by itself. It also knows the query scale by the number of layers only; where the config
has another one, the difference is multiplied into q (Gemma 2) or into its norm (Gemma 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from acip_export.errors import UnsupportedError
from acip_export.model.architectures import architecture_of
from acip_export.model.shape import ModelShape
from converters.gguf.architectures.base import (
    ATTENTION,
    FFN,
    HEAD_NORMS,
    POST_NORMS,
    PRE_NORMS,
    Change,
    Family,
    window_keys,
)
from converters.gguf.architectures.rope import read_rope
from converters.gguf.writer import Value, float32

# transformers calls the tanh approximation gelu_pytorch_tanh; Gemma 1's first configs said gelu and meant it.
_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Gemma(Family):
    """Attributes beyond the family's.

    scaled: tensor of a layer that takes what the query scale differs from llama.cpp's; empty: the scale is fixed.
    large: number of layers for which llama.cpp scales by the hidden size per head, not by the head's own size.
    period: every ``period``-th layer attends to everything, unless the file says otherwise.
    attention_cap: the model has a soft cap on attention scores.
    """

    scaled: str = ""
    large: int = 0
    period: int = 1
    attention_cap: bool = False

    def change(self, name: str, config: Mapping[str, Any], shape: ModelShape) -> Change:
        change = super().change(name, config, shape)
        if not self.scaled or name.split(".")[-2] != self.scaled:
            return change
        width = shape.hidden // shape.heads if shape.layers == self.large else shape.head_dim
        return replace(change, scale=(width / float(config.get("query_pre_attn_scalar", 256))) ** 0.5)

    def own_keys(self, config: Mapping[str, Any], shape: ModelShape) -> dict[str, Value]:
        keys = window_keys(shape, self.period)
        if self.attention_cap:
            keys["attn_logit_softcapping"] = float32(float(config.get("attn_logit_softcapping", 50.0)))
        cap = config.get("final_logit_softcapping", 30.0 if self.attention_cap else None)
        if cap:
            keys["final_logit_softcapping"] = float32(float(cap))
        if shape.sliding_window is not None and architecture_of(config).rotary.local_theta is not None:
            local = read_rope(config, shape, ("default",), "sliding_attention")
            keys["rope.freq_base_swa"] = float32(local.theta)
        return keys

    def check(self, config: Mapping[str, Any], shape: ModelShape) -> None:
        super().check(config, shape)
        if config.get("use_bidirectional_attention"):
            raise UnsupportedError("config.json asks for bidirectional attention; llama.cpp's Gemma looks back only")
        caps = {name: config.get(name, "default") for name in ("attn_logit_softcapping", "final_logit_softcapping")}
        if self.attention_cap and None in caps.values():
            raise UnsupportedError(
                f"llama.cpp's {self.name!r} always caps attention and logits; config.json has {caps}"
            )


GEMMA = Gemma(
    name="gemma",
    model_types=("gemma",),
    factor_pairs=True,
    activations=(_GELU, "gelu"),
    rope_kinds=("default",),
    shifted_norms=True,
)
GEMMA2 = Gemma(
    name="gemma2",
    model_types=("gemma2",),
    factor_pairs=True,
    applies_windows=True,
    layer=(*PRE_NORMS, *POST_NORMS, *ATTENTION, *FFN),
    activations=(_GELU,),
    rope_kinds=("default",),
    shifted_norms=True,
    scaled="attn_q",
    large=46,
    period=2,
    attention_cap=True,
)
GEMMA3 = Gemma(
    name="gemma3",
    model_types=("gemma3_text",),
    factor_pairs=True,
    applies_windows=True,
    layer=(*PRE_NORMS, *POST_NORMS, *ATTENTION, *HEAD_NORMS, *FFN),
    activations=(_GELU,),
    rope_kinds=("default", "linear"),
    shifted_norms=True,
    scaled="attn_q_norm",
    large=62,
    period=6,
)
