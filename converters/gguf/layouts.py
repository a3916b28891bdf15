"""The ways in which a model is arranged in GGUF files."""

from __future__ import annotations

from acip_export.artifacts.plan import Representation
from acip_export.choices import instead_of
from acip_export.errors import UnsupportedError
from acip_export.formats.protocol import Layout

LAYOUTS = (
    Layout("stock", "one file of dense tensors, a type per tensor; stock llama.cpp runs it", None),
    Layout(
        "lora",
        "a LoRA file with factor pairs, over an all-zero one-bit base or as corrections of a quantized one; "
        "stock llama.cpp runs both",
        "lora",
        base_type="q1_0",
        # q8_0 needs ranks that are multiples of its block. More than rank 128 is better spent on the base.
        residual_pairs=(("f16", 8), ("f16", 16), ("q8_0", 32), ("q8_0", 64), ("q8_0", 128)),
    ),
    Layout(
        "factored",
        "one file with factor pairs as tensors of their own; a llama.cpp with our extension runs it",
        "factored",
        note="only a llama.cpp with our extension runs this layout: make llama-cpp, or docs/guides/factor-pairs.md",
    ),
)


def low_rank_of(layout: str) -> Representation | None:
    """Return the representation that carries a layout's factor pairs; ``None`` when it has none.

    Raises:
        UnsupportedError: there is no such layout.
    """
    for known in LAYOUTS:
        if known.name == layout:
            return known.low_rank
    raise UnsupportedError(f"gguf has no layout {layout!r}; {instead_of(layout, (known.name for known in LAYOUTS))}")
