"""Llama 2 and 3, SmolLM 2, and Mistral: the same graph."""

from converters.gguf.architectures.base import ATTENTION_BIASES, FFN_BIASES, Family

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    factor_pairs=True,
    optional=(*ATTENTION_BIASES, *FFN_BIASES),
    rope_kinds=("default", "linear", "llama3", "yarn", "longrope"),
    interleaved_rope=True,
)
