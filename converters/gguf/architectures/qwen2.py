"""Qwen 2 and 2.5: biases on q, k and v."""

from converters.gguf.architectures.base import Family

FAMILY = Family(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    extra=("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    square_query=True,
)
