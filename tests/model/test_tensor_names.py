"""Which layer a name is in, in every naming that models, exports and graphs have."""

from __future__ import annotations

import pytest

from acip_export.model.tensor_names import block_of, layer_of, within_layer, without_numbers


@pytest.mark.parametrize(
    ("name", "block", "layer", "within"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3", 3, "mlp.up_proj.weight"),
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11", 11, "attn.c_attn.weight"),
        ("h.0.mlp", "h.0", 0, "mlp"),
        ("gpt_neox.layers.10.attention.dense.weight", "gpt_neox.layers.10", 10, "attention.dense.weight"),
        ("bert.encoder.layer.7.output.dense.bias", "bert.encoder.layer.7", 7, "output.dense.bias"),
        ("model.decoder.layers.2.fc1.weight", "model.decoder.layers.2", 2, "fc1.weight"),
        ("model.layers.4.mlp.experts.31.up_proj", "model.layers.4", 4, "mlp.experts.31.up_proj"),
        ("blk.12.attn_q.weight", "blk.12", 12, "attn_q.weight"),
        ("/model/layers.5/attn/q_proj/MatMul", "/model/layers.5", 5, "attn/q_proj/MatMul"),
        ("0.weight", "0", 0, "weight"),
        ("model.embed_tokens.weight", None, None, "model.embed_tokens.weight"),
        ("lm_head.weight", None, None, "lm_head.weight"),
        ("model.conv1d.w2.weight", None, None, "model.conv1d.w2.weight"),
        ("model.layers.3", None, None, "model.layers.3"),
        ("val_12", None, None, "val_12"),
    ],
)
def test_layers(name: str, block: str | None, layer: int | None, within: str) -> None:
    assert (block_of(name), layer_of(name), within_layer(name)) == (block, layer, within)


def test_only_numbers_that_stand_alone_are_folded() -> None:
    assert without_numbers("blk.12.attn_q.weight") == "blk.*.attn_q.weight"
    folded = without_numbers("model.layers.3.mlp.up_proj.MatMulNBits.qweight")
    assert folded == "model.layers.*.mlp.up_proj.MatMulNBits.qweight"
    assert without_numbers("/model/layers.3/conv1d/w2") == "/model/layers.*/conv1d/w2"
