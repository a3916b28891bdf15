"""Qwen 3: norms on the heads of q and k."""

from converters.gguf.architectures.base import ATTENTION, FFN, HEAD_NORMS, PRE_NORMS, Family

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    factor_pairs=True,
    layer=(*PRE_NORMS, *ATTENTION, *HEAD_NORMS, *FFN),
)
