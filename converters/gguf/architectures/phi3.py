"""Phi 3, 3.5 and 4: q, k and v in one tensor, gate and up in another."""

from converters.gguf.architectures.base import PRE_NORMS, Family

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    factor_pairs=True,
    layer=(*PRE_NORMS, "attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    rope_kinds=("default", "longrope"),
    partial_rope=True,
    square_query=True,
)
