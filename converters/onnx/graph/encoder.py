"""The graph of a BERT-style encoder, from names and shapes alone: no torch, no weights, no model builder.

Inputs ``input_ids``, ``attention_mask`` and ``token_type_ids``, each (batch, sequence) int64 of any size. Outputs by
kind: ``last_hidden_state`` and ``sentence_embedding`` (pooled and normalised as the model's own files say), or
``logits``.
Every matrix is a node of its own, a factor pair two of them; attention is one fused node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.model.encoder import Encoder
from acip_export.model.tensor_names import MASKED_HEAD
from converters.onnx.graph.decided import IR_VERSION, MICROSOFT, OPSET, Contents, DecidedGraph, shaped

_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
_BATCH, _SEQUENCE = "batch_size", "sequence_length"
_IDS, _MASK, _TYPES = _INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def build_encoder(
    config: Mapping[str, Any], encoder: Encoder, tensors: Sequence[TensorDecision], accuracy_level: int
) -> tuple[onnx.ModelProto, Contents]:
    """The graph, and the contents of its initializers in the order in which they are stored.

    Args:
        accuracy_level: of quantized products: 0 computes in float32, 4 rounds activations to int8 (faster).

    Raises:
        UnsupportedError: an activation, position encoding or decision that has no place in the graph.
    """
    _check_config(config)
    graph = _Graph(tensors, accuracy_level)
    hidden, mask = _transformer(graph, config, encoder)
    width = int(config["hidden_size"])
    if encoder.kind == "embedding":
        outputs = [
            graph.output("last_hidden_state", hidden, (_BATCH, _SEQUENCE, width)),
            graph.output("sentence_embedding", _pooled(graph, hidden, mask, encoder), (_BATCH, width)),
        ]
    elif encoder.kind == "classification":
        logits = _classified(graph, hidden)
        outputs = [graph.output("logits", logits, (_BATCH, graph.rows("classifier.weight")))]
    else:
        logits = _predicted(graph, hidden, config, encoder)
        outputs = [graph.output("logits", logits, (_BATCH, _SEQUENCE, int(config["vocab_size"])))]
    return graph.model(outputs), graph.contents


def _check_config(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"no ONNX export for activation {activation!r}; supported: {', '.join(_ACTIVATIONS)}")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute" or config.get("is_decoder"):
        raise UnsupportedError(
            f"no ONNX export for a BERT with {positions} positions (is_decoder={bool(config.get('is_decoder'))})"
        )


class _Graph(DecidedGraph):
    """With the inputs, activations and outputs of encoders."""

    def activation(self, config: Mapping[str, Any], x: str, name: str) -> str:
        kind, attributes = _ACTIVATIONS[config.get("hidden_act", "gelu")]
        return self.node(kind, [x], f"{name}/{kind}", **attributes)

    def output(self, name: str, value: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
        self.node("Identity", [value], f"/{name}", output=name)
        return shaped(name, TensorProto.FLOAT, shape)

    def model(self, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
        if self.unused:
            raise UnsupportedError(
                f"ONNX has no place for {min(self.unused)} in this encoder; the config says otherwise"
            )
        model = onnx.ModelProto(ir_version=IR_VERSION)
        for domain, release in (("", OPSET), (MICROSOFT, 1)):
            model.opset_import.add(domain=domain, version=release)
        model.graph.name = "encoder"
        model.graph.input.extend(shaped(name, TensorProto.INT64, (_BATCH, _SEQUENCE)) for name in _INPUTS)
        model.graph.output.extend(outputs)
        self.write(model.graph)
        return model


def _transformer(graph: _Graph, config: Mapping[str, Any], encoder: Encoder) -> tuple[str, str]:
    """Token vectors, and the mask of keys for attention, (batch, sequence) int32."""
    epsilon = float(config.get("layer_norm_eps", 1e-12))
    prefix = f"{encoder.prefix}embeddings"
    words = graph.lookup(encoder.word_embeddings, _IDS, f"/{prefix}/word_embeddings")
    length = graph.node("Shape", [_IDS], f"/{prefix}/Shape", start=1, end=2)
    positions = graph.node(
        "Slice",
        [graph.table(f"{prefix}.position_embeddings.weight"), graph.integers(0), length, graph.integers(0)],
        f"/{prefix}/position_embeddings/Slice",
    )
    types = graph.node(
        "Gather",
        [graph.table(f"{prefix}.token_type_embeddings.weight"), _TYPES],
        f"/{prefix}/token_type_embeddings/Gather",
    )
    sum_ = graph.node("Add", [words, types], f"/{prefix}/Add")
    hidden = graph.node("Add", [sum_, positions], f"/{prefix}/Add_1")
    hidden = graph.norm(f"{prefix}.LayerNorm", hidden, epsilon)
    mask = graph.node("Cast", [_MASK], "/attention_mask/Cast", to=int(TensorProto.INT32))
    for index in range(int(config["num_hidden_layers"])):
        layer = f"{encoder.prefix}encoder.layer.{index}"
        stem = f"/{layer.replace('.', '/')}"
        query, key, value = (
            graph.linear(f"{layer}.attention.self.{kind}", hidden) for kind in ("query", "key", "value")
        )
        attended = graph.node(
            "MultiHeadAttention",
            [query, key, value, None, mask],
            f"{stem}/attention/MultiHeadAttention",
            MICROSOFT,
            num_heads=int(config["num_attention_heads"]),
        )
        attended = graph.linear(f"{layer}.attention.output.dense", attended)
        hidden = graph.node("Add", [attended, hidden], f"{stem}/attention/output/residual")
        hidden = graph.norm(f"{layer}.attention.output.LayerNorm", hidden, epsilon)
        wide = graph.activation(config, graph.linear(f"{layer}.intermediate.dense", hidden), f"{stem}/intermediate")
        narrow = graph.linear(f"{layer}.output.dense", wide)
        hidden = graph.node("Add", [narrow, hidden], f"{stem}/output/residual")
        hidden = graph.norm(f"{layer}.output.LayerNorm", hidden, epsilon)
    return hidden, mask


def _pooled(graph: _Graph, hidden: str, mask: str, encoder: Encoder) -> str:
    assert encoder.pooling is not None
    if encoder.pooling.mode == "cls":
        vector = graph.node("Gather", [hidden, graph.integer(0)], "/pooling/Gather", axis=1)
    else:
        column = graph.node("Unsqueeze", [mask, graph.integers(-1)], "/pooling/Unsqueeze")
        if encoder.pooling.mode == "max":
            real = graph.node("Cast", [column], "/pooling/Cast", to=int(TensorProto.BOOL))
            kept = graph.node("Where", [real, hidden, graph.number(float("-inf"))], "/pooling/Where")
            vector = graph.node("ReduceMax", [kept, graph.integers(1)], "/pooling/ReduceMax", keepdims=0)
        else:
            weight = graph.node("Cast", [column], "/pooling/Cast", to=int(TensorProto.FLOAT))
            kept = graph.node("Mul", [hidden, weight], "/pooling/Mul")
            total = graph.node("ReduceSum", [kept, graph.integers(1)], "/pooling/ReduceSum", keepdims=0)
            count = graph.node("ReduceSum", [weight, graph.integers(1)], "/pooling/ReduceSum_1", keepdims=0)
            count = graph.node("Max", [count, graph.number(1e-9)], "/pooling/Max")
            vector = graph.node("Div", [total, count], "/pooling/Div")
    if not encoder.pooling.normalize:
        return vector
    norm = graph.node("ReduceL2", [vector, graph.integers(-1)], "/normalize/ReduceL2", keepdims=1)
    norm = graph.node("Max", [norm, graph.number(1e-12)], "/normalize/Max")
    return graph.node("Div", [vector, norm], "/normalize/Div")


def _classified(graph: _Graph, hidden: str) -> str:
    first = graph.node("Gather", [hidden, graph.integer(0)], "/pooler/Gather", axis=1)
    pooled = graph.node("Tanh", [graph.linear("bert.pooler.dense", first)], "/pooler/Tanh")
    return graph.linear("classifier", pooled)


def _predicted(graph: _Graph, hidden: str, config: Mapping[str, Any], encoder: Encoder) -> str:
    head = "cls.predictions"
    hidden = graph.linear(f"{head}.transform.dense", hidden)
    hidden = graph.activation(config, hidden, "/cls/predictions/transform")
    hidden = graph.norm(f"{head}.transform.LayerNorm", hidden, float(config.get("layer_norm_eps", 1e-12)))
    name = "/cls/predictions/decoder/MatMul"
    logits = graph.head(MASKED_HEAD if MASKED_HEAD in graph.decisions else encoder.word_embeddings, hidden, name)
    return graph.node("Add", [logits, graph.vector(f"{head}.bias")], "/cls/predictions/Add")
