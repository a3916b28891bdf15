"""Sliding windows as llama.cpp knows them."""

from __future__ import annotations

from acip_export.formats.protocol import applies_window, longest_context
from acip_export.model.checkpoint import ModelShape

# Hugging Face classes whose sliding windows llama.cpp applies.
WINDOWED = frozenset({"Gemma2ForCausalLM", "Gemma3ForCausalLM"})


def llama_applies_window(shape: ModelShape) -> bool:
    """Tell whether the model has a sliding window that llama.cpp applies."""
    return applies_window(shape, WINDOWED)


def llama_context(shape: ModelShape) -> int:
    """Return the tokens up to which llama.cpp computes what the model does."""
    return longest_context(shape, WINDOWED)
