"""The tensors that a ``config.json`` promises, by name and shape, without torch: one row for each known model type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acip_export.model.encoder import is_encoder, kind_of
from acip_export.model.tensor_names import HEAD

if TYPE_CHECKING:
    from acip_export.model.checkpoint import ModelShape

Shapes = dict[str, tuple[int, ...]]

_EMBEDDING = "model.embed_tokens.weight"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MORE_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Decoder:
    """What a layer of a decoder has under transformers' names, beyond projections and their sizes.

    Attributes:
        norms: as wide as the hidden size. head_norms: of queries and keys, one head wide; ``whole``: of all heads.
        attention_bias, mlp_bias: whether the keys of these names in ``config.json`` switch biases on.
        always_biased: projections with a bias whatever the configuration says.
        fused: q, k and v are one matrix, gate and up another.
    """

    norms: tuple[str, ...] = _NORMS
    head_norms: bool = False
    whole: bool = False
    attention_bias: bool = True
    mlp_bias: bool = False
    always_biased: tuple[str, ...] = ()
    fused: bool = False


_DECODERS: Mapping[str, Decoder] = {
    "gemma": Decoder(),
    "gemma2": Decoder(norms=(*_NORMS, *_MORE_NORMS)),
    "gemma3_text": Decoder(norms=(*_NORMS, *_MORE_NORMS), head_norms=True),
    "granite": Decoder(mlp_bias=True),
    "llama": Decoder(mlp_bias=True),
    "mistral": Decoder(attention_bias=False),
    "olmo2": Decoder(norms=("post_attention_layernorm", "post_feedforward_layernorm"), head_norms=True, whole=True),
    "phi3": Decoder(attention_bias=False, fused=True),
    "qwen2": Decoder(attention_bias=False, always_biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": Decoder(head_norms=True),
    "smollm3": Decoder(mlp_bias=True),
}


def expected_tensors(config: Mapping[str, Any], shape: ModelShape, layers: int) -> Shapes | None:
    """``{name: shape}`` of everything that a model of ``config`` reads, a tied head left out.

    Args:
        layers: how many are listed; a damaged configuration may ask for more than can be.

    Returns:
        ``None`` for a model type that has no row.
    """
    if is_encoder(config):
        return dict(_encoder(config, shape, layers))
    row = _DECODERS.get(str(config.get("model_type")))
    return None if row is None else dict(_decoder(row, config, shape, layers))


def bias_key(config: Mapping[str, Any], name: str) -> str | None:
    """The key of ``config.json`` that switches the bias ``name`` on and off; ``None``: no key does."""
    row = _DECODERS.get(str(config.get("model_type")))
    if row is None or not name.endswith(".bias"):
        return None
    if ".self_attn." in name and row.attention_bias:
        return "attention_bias"
    return "mlp_bias" if ".mlp." in name and row.mlp_bias else None


def _decoder(
    row: Decoder, config: Mapping[str, Any], shape: ModelShape, layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if row.fused:
        attention = {"qkv_proj": (queries + 2 * keys, shape.hidden)}
        mlp = {"gate_up_proj": (2 * shape.ffn, shape.hidden)}
    else:
        attention = {"q_proj": (queries, shape.hidden), **dict.fromkeys(("k_proj", "v_proj"), (keys, shape.hidden))}
        mlp = dict.fromkeys(("gate_proj", "up_proj"), (shape.ffn, shape.hidden))
    attention["o_proj"] = shape.hidden, queries
    mlp["down_proj"] = shape.hidden, shape.ffn
    with_bias = {
        *(attention if row.attention_bias and config.get("attention_bias") else ()),
        *(mlp if row.mlp_bias and config.get("mlp_bias") else ()),
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
    yield _EMBEDDING, (shape.vocabulary, shape.hidden)
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
            yield "cls.predictions.decoder.weight", (shape.vocabulary, width)


def _linear(name: str, outputs: int, inputs: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))


def _norm(name: str, width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (f"{name}.weight", (width,)), (f"{name}.bias", (width,))
