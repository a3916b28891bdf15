"""The graph of a BERT-style encoder, from names and shapes alone: no torch, no weights, no model builder.

Inputs ``input_ids``, ``attention_mask`` and ``token_type_ids``, each (batch, sequence) int64 of any size. Outputs by
kind: ``last_hidden_state`` and ``sentence_embedding`` (pooled and normalised as the model's own files say), or
``logits``.
Every matrix is a node of its own, a factor pair two of them; attention is one fused node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from acip_export.encoder import Encoder
from acip_export.errors import UnsupportedError
from acip_export.plans import TensorDecision
from converters.onnx.matrices import Form, Matrix, MatrixPart, Vector, matrices_of

_OPSET, _IR_VERSION = 20, 10
_MICROSOFT = "com.microsoft"
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
}
_BATCH, _SEQUENCE = "batch_size", "sequence_length"

Contents = dict[str, MatrixPart | Vector]


def build_encoder(
    config: Mapping[str, Any], encoder: Encoder, tensors: Sequence[TensorDecision], accuracy_level: int
) -> tuple[ir.Model, Contents]:
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


class _Graph:
    """Nodes, initializers and their contents, in the order in which they are asked for."""

    def __init__(self, tensors: Sequence[TensorDecision], accuracy_level: int) -> None:
        self.decisions = {decision.name: decision for decision in tensors}
        self.unused = set(self.decisions)
        self.accuracy_level = accuracy_level
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.contents: Contents = {}
        self.constants: dict[str, ir.Value] = {}
        self.inputs = {
            name: ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([_BATCH, _SEQUENCE]))
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        output = ir.Value(name=f"{name}/output_0")
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        self.nodes.append(ir.Node(domain, kind, inputs, attrs, outputs=[output], name=name))
        return output

    def decision(self, tensor: str) -> TensorDecision:
        if tensor not in self.decisions:
            raise UnsupportedError(f"the plan decides nothing for {tensor}, which the encoder needs; plan again")
        self.unused.discard(tensor)
        return self.decisions[tensor]

    def rows(self, tensor: str) -> int:
        return self.decision(tensor).shape[0]

    def initializer(self, name: str, content: MatrixPart | Vector) -> ir.Value:
        """An initializer without numbers; the same content is stored once."""
        if name not in self.initializers:
            dtype = ir.DataType.from_numpy(content.dtype)
            shape = ir.Shape(content.shape)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
            value.const_value = ir.LazyTensor(_no_numbers, dtype=dtype, shape=shape, name=name)
            self.initializers[name], self.contents[name] = value, content
        return self.initializers[name]

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """In the graph itself: shape inference does not look into external data."""
        name = f"/constants/{array.dtype}/{array.tolist()}"
        if name not in self.constants:
            self.constants[name] = self.node("Constant", [], name, value=ir.tensor(array))
        return self.constants[name]

    def integers(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> ir.Value:
        return self.constant(np.array(value, np.int64))

    def number(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def vector(self, tensor: str) -> ir.Value:
        decision = self.decision(tensor)
        if decision.format != "f32":
            raise UnsupportedError(f"{tensor}: ONNX norms and biases are f32, not {decision.format}; plan again")
        return self.initializer(tensor, Vector(tensor, decision.shape))

    def part(self, matrix: Matrix, form: Form) -> ir.Value:
        suffix = {"codes": ".codes", "scales": ".scales"}.get(form, "")
        return self.initializer(f"{matrix.tensor}{suffix}", MatrixPart(matrix, form))

    def table(self, tensor: str) -> ir.Value:
        """A float table, by row."""
        matrix = self.single(tensor)
        if not matrix.format.is_float:
            raise UnsupportedError(f"{tensor}: ONNX keeps this table in f32, not {matrix.format.name}; plan again")
        return self.part(matrix, "rows")

    def single(self, tensor: str) -> Matrix:
        chain = matrices_of(self.decision(tensor))
        if len(chain) != 1:
            raise UnsupportedError(f"{tensor}: ONNX embeddings are dense; plan again")
        return chain[0][1]

    def lookup(self, tensor: str, ids: ir.Value, name: str) -> ir.Value:
        """Rows of an embedding that may be quantized."""
        matrix = self.single(tensor)
        if matrix.format.is_float:
            return self.node("Gather", [self.part(matrix, "rows"), ids], f"{name}/Gather")
        if matrix.bits not in (4, 8):
            raise UnsupportedError(f"{tensor}: ONNX embeddings are float or of 4 or 8 bits, not {matrix.bits}")
        flat = self.integers(matrix.rows, matrix.blocks * matrix.block_code_bytes)
        # With the blocks as a dimension of their own, so that a tied head can read the same bytes.
        codes = self.node("Reshape", [self.part(matrix, "codes"), flat], f"{name}/Reshape")
        found = self.node(
            "GatherBlockQuantized",
            [codes, ids, self.part(matrix, "scales")],
            f"{name}/GatherBlockQuantized",
            _MICROSOFT,
            bits=matrix.bits,
            block_size=matrix.format.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if matrix.blocks * matrix.format.block == matrix.columns:
            return found
        bounds = [self.integers(value) for value in (0, matrix.columns, -1)]
        return self.node("Slice", [found, *bounds], f"{name}/Slice")

    def linear(self, module: str, x: ir.Value) -> ir.Value:
        """A linear layer: one product, or two for a factor pair, and the bias."""
        stem = f"/{module.replace('.', '/')}"
        for label, matrix in matrices_of(self.decision(f"{module}.weight")):
            x = self.product(matrix, x, f"{stem}/{label}/MatMul" if label else f"{stem}/MatMul")
        if f"{module}.bias" not in self.decisions:
            return x
        return self.node("Add", [x, self.vector(f"{module}.bias")], f"{stem}/Add")

    def product(self, matrix: Matrix, x: ir.Value, name: str) -> ir.Value:
        if matrix.format.is_float:
            return self.node("MatMul", [x, self.part(matrix, "columns")], name)
        return self.node(
            "MatMulNBits",
            [x, self.part(matrix, "codes"), self.part(matrix, "scales")],
            f"{name}NBits",
            _MICROSOFT,
            accuracy_level=self.accuracy_level,
            bits=matrix.bits,
            block_size=matrix.format.block,
            K=matrix.columns,
            N=matrix.rows,
        )

    def norm(self, module: str, x: ir.Value, epsilon: float) -> ir.Value:
        scale, bias = self.vector(f"{module}.weight"), self.vector(f"{module}.bias")
        name = f"/{module.replace('.', '/')}/LayerNormalization"
        return self.node("LayerNormalization", [x, scale, bias], name, epsilon=epsilon, axis=-1)

    def activation(self, config: Mapping[str, Any], x: ir.Value, name: str) -> ir.Value:
        kind, attributes = _ACTIVATIONS[config.get("hidden_act", "gelu")]
        return self.node(kind, [x], f"{name}/{kind}", **attributes)

    def output(self, name: str, value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
        found = self.node("Identity", [value], f"/{name}")
        found.name, found.type, found.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return found

    def model(self, outputs: Sequence[ir.Value]) -> ir.Model:
        if self.unused:
            raise UnsupportedError(
                f"ONNX has no place for {min(self.unused)} in this encoder; the config says otherwise"
            )
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": _OPSET, _MICROSOFT: 1},
            name="encoder",
        )
        return ir.Model(graph, ir_version=_IR_VERSION)


def _transformer(graph: _Graph, config: Mapping[str, Any], encoder: Encoder) -> tuple[ir.Value, ir.Value]:
    """Token vectors, and the mask of keys for attention, (batch, sequence) int32."""
    ids, epsilon = graph.inputs["input_ids"], float(config.get("layer_norm_eps", 1e-12))
    prefix = f"{encoder.prefix}embeddings"
    words = graph.lookup(encoder.word_embeddings, ids, f"/{prefix}/word_embeddings")
    length = graph.node("Shape", [ids], f"/{prefix}/Shape", start=1, end=2)
    positions = graph.node(
        "Slice",
        [graph.table(f"{prefix}.position_embeddings.weight"), graph.integers(0), length, graph.integers(0)],
        f"/{prefix}/position_embeddings/Slice",
    )
    types = graph.node(
        "Gather",
        [graph.table(f"{prefix}.token_type_embeddings.weight"), graph.inputs["token_type_ids"]],
        f"/{prefix}/token_type_embeddings/Gather",
    )
    sum_ = graph.node("Add", [words, types], f"/{prefix}/Add")
    hidden = graph.node("Add", [sum_, positions], f"/{prefix}/Add_1")
    hidden = graph.norm(f"{prefix}.LayerNorm", hidden, epsilon)
    mask = graph.node("Cast", [graph.inputs["attention_mask"]], "/attention_mask/Cast", to=int(ir.DataType.INT32))
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
            _MICROSOFT,
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


def _pooled(graph: _Graph, hidden: ir.Value, mask: ir.Value, encoder: Encoder) -> ir.Value:
    assert encoder.pooling is not None
    if encoder.pooling.mode == "cls":
        vector = graph.node("Gather", [hidden, graph.integer(0)], "/pooling/Gather", axis=1)
    else:
        column = graph.node("Unsqueeze", [mask, graph.integers(-1)], "/pooling/Unsqueeze")
        if encoder.pooling.mode == "max":
            real = graph.node("Cast", [column], "/pooling/Cast", to=int(ir.DataType.BOOL))
            kept = graph.node("Where", [real, hidden, graph.number(float("-inf"))], "/pooling/Where")
            vector = graph.node("ReduceMax", [kept, graph.integers(1)], "/pooling/ReduceMax", keepdims=0)
        else:
            weight = graph.node("Cast", [column], "/pooling/Cast", to=int(ir.DataType.FLOAT))
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


def _classified(graph: _Graph, hidden: ir.Value) -> ir.Value:
    first = graph.node("Gather", [hidden, graph.integer(0)], "/pooler/Gather", axis=1)
    pooled = graph.node("Tanh", [graph.linear("bert.pooler.dense", first)], "/pooler/Tanh")
    return graph.linear("classifier", pooled)


def _predicted(graph: _Graph, hidden: ir.Value, config: Mapping[str, Any], encoder: Encoder) -> ir.Value:
    head = "cls.predictions"
    hidden = graph.linear(f"{head}.transform.dense", hidden)
    hidden = graph.activation(config, hidden, "/cls/predictions/transform")
    hidden = graph.norm(f"{head}.transform.LayerNorm", hidden, float(config.get("layer_norm_eps", 1e-12)))
    name = "/cls/predictions/decoder/MatMul"
    untied = f"{head}.decoder.weight"
    matrix = graph.single(untied if untied in graph.decisions else encoder.word_embeddings)
    if matrix.format.is_float and untied not in graph.decisions:
        # The embedding's initializer serves both. A Transpose node would be folded into a copy.
        rows = graph.part(matrix, "rows")
        logits = graph.node("FusedMatMul", [hidden, rows], name, _MICROSOFT, transB=1)
    else:
        logits = graph.product(matrix, hidden, name)
    return graph.node("Add", [logits, graph.vector(f"{head}.bias")], "/cls/predictions/Add")


def _no_numbers() -> ir.TensorProtocol:
    raise AssertionError("initializers are written from the bundle, never from the graph")
