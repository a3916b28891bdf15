"""ERNIE 4.5: Llama, with q and k already in the order that llama.cpp rotates."""

from converters.gguf.architectures.base import Family

FAMILY = Family(name="ernie4_5", model_types=("ernie4_5",), factor_pairs=True)
