"""Llama 2 and 3."""

from converters.gguf.architectures.base import Family

FAMILY = Family(
    name="llama",
    classes=("LlamaForCausalLM",),
    optional=(
        "attn_q.bias",
        "attn_k.bias",
        "attn_v.bias",
        "attn_output.bias",
        "ffn_gate.bias",
        "ffn_up.bias",
        "ffn_down.bias",
    ),
    interleaved_rope=True,
)
