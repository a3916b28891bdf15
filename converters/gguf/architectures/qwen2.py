"""Qwen 2 and 2.5: biases on q, k and v."""

from converters.gguf.architectures.base import ATTENTION, ATTENTION_BIASES, FFN, PRE_NORMS, Family

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    factor_pairs=True,
    layer=(*PRE_NORMS, *ATTENTION, *ATTENTION_BIASES[:3], *FFN),
    square_query=True,
)
