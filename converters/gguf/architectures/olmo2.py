"""OLMo 2: norms after attention and FFN only, and over all heads of q and k together."""

from converters.gguf.architectures.base import ATTENTION, FFN, HEAD_NORMS, POST_NORMS, Family

FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    factor_pairs=True,
    layer=(*POST_NORMS, *ATTENTION, *HEAD_NORMS, *FFN),
    square_query=True,
    always_head=True,
)
