"""Qwen 3: norms on the heads of q and k."""

from converters.gguf.architectures.base import ATTENTION, FFN, PRE_NORMS, Family

HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")

FAMILY = Family(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    layer=(*PRE_NORMS, *ATTENTION, *HEAD_NORMS, *FFN),
)
