"""OLMo 2: norms after attention and FFN only, and over all heads of q and k together."""

from converters.gguf.architectures.base import ATTENTION, FFN, POST_NORMS, Family
from converters.gguf.architectures.qwen3 import HEAD_NORMS

FAMILY = Family(
    name="olmo2",
    classes=("Olmo2ForCausalLM",),
    layer=(*POST_NORMS, *ATTENTION, *HEAD_NORMS, *FFN),
    square_query=True,
    always_head=True,
)
