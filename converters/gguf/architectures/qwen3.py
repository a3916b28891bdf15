"""Qwen 3: norms on the heads of q and k."""

from converters.gguf.architectures.base import Family

FAMILY = Family(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    extra=("attn_q_norm.weight", "attn_k_norm.weight"),
)
