"""The tensors that a ``config.json`` promises, by name and shape, without torch, for architectures with a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from acip_export.model.architectures import Layer, architecture_of
from acip_export.model.encoder import is_encoder, kind_of
from acip_export.model.tensor_names import DECODER_EMBEDDING, HEAD, MASKED_HEAD

if TYPE_CHECKING:
    from acip_export.model.shape import ModelShape

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(config: Mapping[str, Any], shape: ModelShape, layers: int) -> Shapes | None:
    """``{name: shape}`` of everything that a model of ``config`` reads, a tied head left out.

    Args:
        layers: how many are listed; a damaged configuration may ask for more than can be.

    Returns:
        ``None`` for a model type whose row has no layer.
    """
    if is_encoder(config):
        return dict(_encoder(config, shape, layers))
    layer = architecture_of(config).layer
    return None if layer is None else dict(_decoder(layer, config, shape, layers))


def bias_key(config: Mapping[str, Any], name: str) -> str | None:
    """The key of ``config.json`` that switches the bias ``name`` on and off; ``None``: no key does."""
    layer = architecture_of(config).layer
    if layer is None or not name.endswith(".bias"):
        return None
    if ".self_attn." in name:
        return layer.attention_bias
    return layer.mlp_bias if ".mlp." in name else None


def _decoder(
    row: Layer, config: Mapping[str, Any], shape: ModelShape, layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if row.fused_projections:
        attention = {"qkv_proj": (queries + 2 * keys, shape.hidden)}
        mlp = {"gate_up_proj": (2 * shape.ffn, shape.hidden)}
    else:
        attention = {"q_proj": (queries, shape.hidden), **dict.fromkeys(("k_proj", "v_proj"), (keys, shape.hidden))}
        mlp = dict.fromkeys(("gate_proj", "up_proj"), (shape.ffn, shape.hidden))
    attention["o_proj"] = shape.hidden, queries
    mlp["down_proj"] = shape.hidden, shape.ffn
    with_bias = {
        *(attention if row.attention_bias and config.get(row.attention_bias) else ()),
        *(mlp if row.mlp_bias and config.get(row.mlp_bias) else ()),
        *row.always_biased,
    }
    layer: Shapes = {f"{norm}.weight": (shape.hidden,) for norm in row.norms}
    for block, projections in (("self_attn", attention), ("mlp", mlp)):
        for name, sizes in projections.items():
            layer[f"{block}.{name}.weight"] = sizes
            if name in with_bias:
                layer[f"{block}.{name}.bias"] = sizes[:1]
    if row.head_norms:
        layer["self_attn.q_norm.weight"] = (queries if row.whole else shape.head_dim,)
        layer["self_attn.k_norm.weight"] = (keys if row.whole else shape.head_dim,)
    yield DECODER_EMBEDDING, (shape.vocabulary, shape.hidden)
    for number in range(layers):
        yield from ((f"model.layers.{number}.{name}", sizes) for name, sizes in layer.items())
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied_embeddings:
        yield HEAD, (shape.vocabulary, shape.hidden)


def _encoder(config: Mapping[str, Any], shape: ModelShape, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    kind, width = kind_of(config), shape.hidden
    prefix = "" if kind == "embedding" else "bert."
    yield f"{prefix}embeddings.word_embeddings.weight", (shape.vocabulary, width)
    yield f"{prefix}embeddings.position_embeddings.weight", (int(config.get("max_position_embeddings") or 512), width)
    yield f"{prefix}embeddings.token_type_embeddings.weight", (int(config.get("type_vocab_size") or 2), width)
    yield from _norm(f"{prefix}embeddings.LayerNorm", width)
    for number in range(layers):
        stem = f"{prefix}encoder.layer.{number}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{stem}.attention.self.{name}", width, width)
        yield from _linear(f"{stem}.attention.output.dense", width, width)
        yield from _norm(f"{stem}.attention.output.LayerNorm", width)
        yield from _linear(f"{stem}.intermediate.dense", shape.ffn, width)
        yield from _linear(f"{stem}.output.dense", width, shape.ffn)
        yield from _norm(f"{stem}.output.LayerNorm", width)
    if kind == "classification":
        labels = config.get("id2label")
        yield from _linear("bert.pooler.dense", width, width)
        yield from _linear("classifier", len(labels) if labels else int(config.get("num_labels") or 2), width)
    elif kind == "masked-lm":
        yield from _linear("cls.predictions.transform.dense", width, width)
        yield from _norm("cls.predictions.transform.LayerNorm", width)
        yield "cls.predictions.bias", (shape.vocabulary,)
        if not shape.tied_embeddings:
            yield MASKED_HEAD, (shape.vocabulary, width)


def _linear(name: str, outputs: int, inputs: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))


def _norm(name: str, width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (f"{name}.weight", (width,)), (f"{name}.bias", (width,))
