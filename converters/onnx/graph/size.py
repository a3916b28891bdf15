"""The size of the graph that :mod:`converters.onnx.genai_builder.builder` writes, from names and shapes alone.

A plan asks for exact file sizes many times and is to be made in a second; importing torch and transformers to walk the
model builder takes three. So the graph is added up here instead: its nodes, value infos and initializers in the
builder's order, as the bytes of their protobuf messages (onnx.proto; field numbers in the comments of the writers
below). What the builder of one release emits is known for the releases in :data:`TESTED`; for any other, and for
whatever this file does not describe, :func:`outline` returns ``None`` and the graph itself is built and measured. Tests
compare both, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from acip_export.artifacts.plan import TensorDecision
from acip_export.model.checkpoint import ModelShape
from acip_export.model.tensor_names import DECODER_EMBEDDING, HEAD
from acip_export.units import ceil_div
from acip_export.version import __version__
from converters.onnx.companion_files import DATA_FILE
from converters.onnx.matrices import BESIDE, Matrix, MatrixPart, matrices_of

TESTED = {"onnxruntime-genai": "0.18.0", "onnx-ir": "1.1.0"}

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_QK_NORM = ("qwen3",)
# Scaled positions change the numbers in the tables, never their sizes.
_ROPE_TYPES = ("default", "linear", "llama3")
_LOCATION = Path(DATA_FILE).name

_FLOAT, _UINT8, _INT32, _INT64 = 1, 2, 6, 7
# TensorProto.DataType: bytes of an element.
_ITEM_BYTES = {_FLOAT: 4, _UINT8: 1, _INT32: 4, _INT64: 8}
_BATCH, _SEQUENCE = "batch_size", "sequence_length"
_MICROSOFT = "com.microsoft"

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class GraphBytes:
    """Bytes of the ``.onnx`` file, and of the data file beside it."""

    protobuf: int
    data: int


def outline(
    config: Mapping[str, Any], shape: ModelShape, tensors: tuple[TensorDecision, ...], context: int
) -> GraphBytes | None:
    """Sizes of the graph and its data, or ``None`` when only building it can tell."""
    if not (_tested() and _described(config, shape, tensors, context)):
        return None
    graph = _Outline({decision.name: decision for decision in tensors}, shape, context)
    graph.walk(qk_norm=config["model_type"] in _QK_NORM, tied=shape.tied_embeddings)
    return GraphBytes(graph.model_bytes(), graph.offset) if graph.complete else None


def _tested() -> bool:
    try:
        return all(version(package) == release for package, release in TESTED.items())
    except PackageNotFoundError:
        return False


def _described(config: Mapping[str, Any], shape: ModelShape, tensors: tuple[TensorDecision, ...], context: int) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    whole = all(float(source.get("partial_rotary_factor") or 1) == 1 for source in (config, rope))
    return (
        config.get("model_type") in _MODEL_TYPES
        and config.get("hidden_act", "silu") == "silu"
        and (rope.get("rope_type") or rope.get("type") or "default") in _ROPE_TYPES
        and whole
        and shape.head_dim % 2 == 0
        and not _slides(config, context)
        and all(decision.representation in ("dense", "factored") for decision in tensors)
    )


def _slides(config: Mapping[str, Any], context: int) -> bool:
    """Whether any layer may look back less far than the context."""
    kind = config["model_type"]
    # As the configurations of transformers have it: Mistral's window is on by default, Qwen's off, Llama has none.
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    used = kind == "mistral" or (kind != "llama" and bool(config.get("use_sliding_window", False)))
    return used and window is not None and int(window) < context


def _varint(value: int) -> int:
    """Bytes of a varint; negative numbers take ten."""
    if 0 <= value < 128:
        return 1
    return 10 if value < 0 else max(1, ceil_div(value.bit_length(), 7))


def _field(length: int) -> int:
    """A length-delimited field with a number up to 15: tag, length, content."""
    return 1 + _varint(length) + length


def _integer(name: str, value: int) -> int:
    """AttributeProto: name (1), i (3), type (20)."""
    return _field(_field(len(name)) + 1 + _varint(value) + 3)


def _real(name: str) -> int:
    """AttributeProto: name (1), f (2), type (20)."""
    return _field(_field(len(name)) + 5 + 3)


@lru_cache(maxsize=100_000)
def _value_info(name: str, dtype: int, shape: Shape) -> int:
    """ValueInfoProto: name (1), type (2) > tensor_type (1) > elem_type (1), shape (2) > dim (1) > value or symbol."""
    dims = sum(_field(_field(len(dim)) if isinstance(dim, str) else 1 + _varint(dim)) for dim in shape)
    return _field(len(name)) + _field(_field(1 + _varint(dtype) + _field(dims)))


class _Outline:
    """Walks the decoder as the builder does and adds up messages.

    Attributes:
        offset: bytes of the data file so far. complete: every decision was used, none was missing.
    """

    def __init__(self, decisions: dict[str, TensorDecision], shape: ModelShape, context: int) -> None:
        self._decisions = decisions
        self._shape = shape
        self._context = context
        self._graph = 0
        self._used: set[str] = set()
        self._missing = False
        self._constants: set[str] = set()
        self.offset = 0

    @property
    def complete(self) -> bool:
        return not self._missing and self._used == set(self._decisions)

    def model_bytes(self) -> int:
        """ModelProto: ir_version (1), producer_name (2), producer_version (3), graph (7), opset_import (8)."""
        opsets = [1 + _varint(22), _field(len(_MICROSOFT)) + 1 + _varint(1)]
        graph = self._graph + _field(len("main_graph"))
        head = 1 + _varint(10) + _field(len("acip-export")) + _field(len(__version__))
        return head + _field(graph) + sum(_field(opset) for opset in opsets)

    def _node(
        self, op: str, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: int = 0, domain: str = ""
    ) -> None:
        """NodeProto: input (1), output (2), name (3), op_type (4), attribute (5), domain (7)."""
        size = sum(_field(len(text)) for text in (*inputs, *outputs, name, op)) + attributes
        self._graph += _field(size + (_field(len(domain)) if domain else 0))

    def _value(self, name: str, shape: Shape, dtype: int = _FLOAT) -> str:
        """GraphProto.value_info (13)."""
        self._graph += _field(_value_info(name, dtype, shape))
        return name

    def _tokens(self, name: str, width: int) -> str:
        return self._value(name, (_BATCH, _SEQUENCE, width))

    def _initializer(self, name: str, shape: tuple[int, ...], dtype: int = _FLOAT) -> str:
        """GraphProto.initializer (5), TensorProto: dims (1), data_type (2), name (8), external_data (13) and its
        location (14)."""
        nbytes = prod(shape) * _ITEM_BYTES[dtype]
        size = sum(1 + _varint(dim) for dim in shape) + 1 + _varint(dtype) + _field(len(name)) + 2
        for key, text in (("location", _LOCATION), ("offset", str(self.offset)), ("length", str(nbytes))):
            size += _field(_field(len(key)) + _field(len(text)))
        self._graph += _field(size)
        self.offset += nbytes
        return self._value(name, shape, dtype)

    def _constant(self, value: int | list[int]) -> str:
        """A Constant node, once for each value; TensorProto: dims (1), data_type (2), name (8), raw_data (9)."""
        name = f"/model/constants/INT64/{value}"
        if name not in self._constants:
            self._constants.add(name)
            count = len(value) if isinstance(value, list) else 1
            tensor = (1 + _varint(count)) * isinstance(value, list) + 2 + _field(len(name)) + _field(8 * count)
            attribute = _field(_field(len("value")) + _field(tensor) + 3)
            self._node("Constant", f"/model/constant_nodes/INT64/{value}", (), (name,), attribute)
            self._value(name, (), _INT64)
        return name

    def walk(self, qk_norm: bool, tied: bool) -> None:
        """The whole decoder."""
        self._interface()
        self._mask()
        hidden, residual = self._embedding(tied), ""
        for layer in range(self._shape.layers):
            hidden, residual = self._layer(layer, hidden, residual, qk_norm)
        last = f"/model/layers.{self._shape.layers}/final_norm_layernorm"
        normed, _ = self._skip_norm(last, "model.norm.weight", residual, hidden, last_one=True)
        self._head(normed, tied)

    def _interface(self) -> None:
        """GraphProto.input (11) and output (12)."""
        cache = (_BATCH, self._shape.kv_heads)
        values: list[tuple[str, int, Shape]] = [
            ("input_ids", _INT64, (_BATCH, _SEQUENCE)),
            ("attention_mask", _INT64, (_BATCH, "total_sequence_length")),
            ("position_ids", _INT64, (_BATCH, _SEQUENCE)),
            ("logits", _FLOAT, (_BATCH, _SEQUENCE, self._shape.vocabulary)),
        ]
        for layer in range(self._shape.layers):
            for kind in ("key", "value"):
                for stem, length in (("past_key_values", "past"), ("present", "total")):
                    dims = (*cache, f"{length}_sequence_length", self._shape.head_dim)
                    values.append((f"{stem}.{layer}.{kind}", _FLOAT, dims))
        self._graph += sum(_field(_value_info(*value)) for value in values)

    def _mask(self) -> None:
        """Lengths for the attention nodes, from the attention mask."""
        stem, one, last = "/model/attn_mask_reformat/attn_mask_subgraph", self._constant([1]), self._constant(1)

        def step(op: str, node: str, inputs: tuple[str, ...], shape: Shape, dtype: int, attributes: int = 0) -> str:
            name = f"{stem}/{node}"
            self._node(op, name, inputs, (f"{name}/output_0",), attributes)
            return self._value(f"{name}/output_0", shape, dtype)

        length = step("ReduceSum", "ReduceSum", ("attention_mask", one), (_BATCH,), _INT64, _integer("keepdims", 0))
        length = step("Sub", "Sub", (length, one), (_BATCH,), _INT64)
        self._lengths = step("Cast", "Sub/Cast", (length,), (_BATCH,), _INT32, _integer("to", _INT32))
        total = step("Shape", "Shape", ("attention_mask",), (2,), _INT64)
        total = step("Gather", "Gather", (total, last), (), _INT64, _integer("axis", 0))
        self._total = step("Cast", "Gather/Cast", (total,), (), _INT32, _integer("to", _INT32))

    def _take(self, name: str) -> TensorDecision | None:
        decision = self._decisions.get(name)
        if decision is None:
            self._missing = True
        self._used.add(name)
        return decision

    def _vector(self, tensor: str, initializer: str) -> str:
        decision = self._take(tensor)
        if decision is None or decision.type != "f32":
            self._missing = True
            return initializer
        return self._initializer(initializer, decision.shape)

    def _matrix_part(self, name: str, part: MatrixPart) -> str:
        return self._initializer(name, part.shape, _UINT8 if part.dtype.itemsize == 1 else _FLOAT)

    def _embedding(self, tied: bool) -> str:
        decision = self._take(DECODER_EMBEDDING)
        matrix = self._lookup(decision)
        if matrix is None:
            return ""
        stem, prefix = "/model/embed_tokens", "model.embed_tokens"
        width = self._shape.hidden
        if matrix.type.is_float:
            weight = self._matrix_part(f"{prefix}.weight", MatrixPart(matrix, "rows"))
            output = f"{stem}/Gather/output_0"
            self._node("Gather", f"{stem}/Gather", (weight, "input_ids"), (output,))
            return self._tokens(output, width)
        packed = matrix.blocks * matrix.block_code_bytes
        codes = self._matrix_part(f"{prefix}.qweight", MatrixPart(matrix, "codes" if tied else "flat_codes"))
        if tied:
            dims = self._constant([matrix.rows, packed])
            reshaped = f"{stem}/Reshape/output_0"
            self._node("Reshape", f"{stem}/Reshape", (codes, dims), (reshaped,))
            codes = self._value(reshaped, (matrix.rows, packed), _UINT8)
        beside = self._beside(prefix, matrix)
        name = f"{stem}/GatherBlockQuantized"
        attributes = _integer("bits", matrix.bits) + _integer("block_size", matrix.type.block)
        attributes += _integer("gather_axis", 0) + _integer("quantize_axis", 1)
        output = f"{name}/output_0"
        self._node("GatherBlockQuantized", name, (codes, "input_ids", *beside), (output,), attributes, _MICROSOFT)
        padded = matrix.blocks * matrix.type.block
        self._tokens(output, padded)
        if padded == width:
            return output
        bounds = [self._constant([value]) for value in (0, width, -1)]
        self._node("Slice", f"{stem}/Slice", (output, *bounds), (f"{stem}/Slice/output_0",))
        return self._tokens(f"{stem}/Slice/output_0", width)

    def _lookup(self, decision: TensorDecision | None) -> Matrix | None:
        """The matrix of an embedding or head, if it is one that the builder's nodes can hold."""
        if decision is None or decision.rank is not None:
            self._missing = True
            return None
        ((_, matrix),) = matrices_of(decision)
        if not (matrix.type.is_float or matrix.bits in (4, 8)):
            self._missing = True
        return matrix

    def _product(self, matrix: Matrix, name: str, source: str, output: str) -> None:
        prefix = name[1:].replace("/", ".")
        if matrix.type.is_float:
            weight = self._matrix_part(f"{prefix}.weight", MatrixPart(matrix, "columns"))
            self._node("MatMul", name, (source, weight), (output,))
            return
        codes = self._matrix_part(f"{prefix}.qweight", MatrixPart(matrix, "codes"))
        self._quantized_product(matrix, name, (source, codes, *self._beside(prefix, matrix)), output)

    def _beside(self, prefix: str, matrix: Matrix) -> list[str]:
        """The inputs that follow a matrix's codes."""
        return [self._matrix_part(f"{prefix}.{BESIDE[form]}", MatrixPart(matrix, form)) for form in matrix.beside]

    def _quantized_product(self, matrix: Matrix, name: str, inputs: Sequence[str], output: str) -> None:
        attributes = {
            "accuracy_level": 4,  # any level is one byte
            "bits": matrix.bits,
            "block_size": matrix.type.block,
            "K": matrix.columns,
            "N": matrix.rows,
        }
        size = sum(_integer(key, value) for key, value in attributes.items())
        self._node("MatMulNBits", name, inputs, (output,), size, _MICROSOFT)

    def _chain(self, module: str, stem: str, source: str) -> str:
        """A projection; returns the name of the result."""
        decision = self._take(f"{module}.weight")
        for label, matrix in matrices_of(decision) if decision is not None else ():
            name = "/".join(part for part in (stem, label, "MatMul") if part)
            name += "" if matrix.type.is_float else "NBits"
            self._product(matrix, name, source, f"{name}/output_0")
            source = self._tokens(f"{name}/output_0", matrix.rows)
        return source

    def _bias(self, module: str, stem: str, source: str) -> str:
        bias = self._decisions.get(f"{module}.bias")
        if bias is None:
            return source
        initializer = self._vector(bias.name, f"{stem[1:].replace('/', '.')}.Add.bias")
        self._node("Add", f"{stem}/Add", (source, initializer), (f"{stem}/Add/output_0",))
        return self._tokens(f"{stem}/Add/output_0", bias.shape[0])

    def _linear(self, module: str, stem: str, source: str) -> str:
        return self._bias(module, stem, self._chain(module, stem, source))

    def _layer(self, layer: int, hidden: str, residual: str, qk_norm: bool) -> tuple[str, str]:
        """Returns what the layer adds, and the stream that it is to be added to."""
        stem, module = f"/model/layers.{layer}", f"model.layers.{layer}"
        if layer == 0:
            normed = self._norm(f"{stem}/input_layernorm", f"{module}.input_layernorm.weight", hidden)
            residual = hidden
        else:
            name = f"{module}.input_layernorm.weight"
            normed, residual = self._skip_norm(f"{stem}/input_layernorm", name, residual, hidden)
        attended = self._attention(layer, normed, qk_norm)
        name = f"{module}.post_attention_layernorm.weight"
        normed, residual = self._skip_norm(f"{stem}/post_attention_layernorm", name, residual, attended)
        return self._mlp(f"{module}.mlp", f"{stem}/mlp", normed), residual

    def _norm(self, stem: str, tensor: str, source: str) -> str:
        weight = self._vector(tensor, f"{stem[1:].replace('/', '.')}.weight")
        output = f"{stem}/output_0"
        self._node("SimplifiedLayerNormalization", f"{stem}/LayerNorm", (source, weight), (output,), _NORM_ATTRIBUTES)
        return self._tokens(output, self._shape.hidden)

    def _skip_norm(self, stem: str, tensor: str, residual: str, added: str, last_one: bool = False) -> tuple[str, str]:
        weight = self._vector(tensor, f"{stem[1:].replace('/', '.')}.weight")
        outputs: Sequence[str] = (f"{stem}/output_0",) if last_one else (f"{stem}/output_0", "", "", f"{stem}/output_3")
        inputs, name = (residual, added, weight), f"{stem}/SkipLayerNorm"
        self._node("SkipSimplifiedLayerNormalization", name, inputs, outputs, _real("epsilon"), _MICROSOFT)
        for output in filter(None, outputs):
            self._tokens(output, self._shape.hidden)
        return outputs[0], outputs[-1]

    def _attention(self, layer: int, source: str, qk_norm: bool) -> str:
        shape, module, stem = self._shape, f"model.layers.{layer}.self_attn", f"/model/layers.{layer}/attn"
        widths = {"q": shape.heads * shape.head_dim, "k": shape.kv_heads * shape.head_dim}
        # All three products come before their biases: the order decides the initializers' offsets.
        paths = {part: self._chain(f"{module}.{part}_proj", f"{stem}/{part}_proj", source) for part in "qkv"}
        paths = {part: self._bias(f"{module}.{part}_proj", f"{stem}/{part}_proj", paths[part]) for part in "qkv"}
        if qk_norm:
            for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
                tensor = f"{module}.{part}_norm.weight"
                paths[part] = self._head_norm(f"{stem}/{part}_norm", tensor, paths[part], heads, widths[part])
        if layer == 0:
            for table in ("cos_cache", "sin_cache"):
                self._initializer(table, (self._context, shape.head_dim // 2))
        for part, width in widths.items():
            name = f"{stem}/{part}_rotary/RotaryEmbedding"
            inputs = (paths[part], "position_ids", "cos_cache", "sin_cache")
            attributes = sum(_integer(key, 0) for key in ("interleaved", "num_heads", "rotary_embedding_dim"))
            self._node("RotaryEmbedding", name, inputs, (f"{name}/output_0",), attributes, _MICROSOFT)
            paths[part] = self._tokens(f"{name}/output_0", width)
        past = tuple(f"past_key_values.{layer}.{kind}" for kind in ("key", "value"))
        name = f"{stem}/GroupQueryAttention"
        everything = (*paths.values(), *past, self._lengths, self._total, "", "", "", "", "")
        outputs = (f"{name}/output_0", f"present.{layer}.key", f"present.{layer}.value")
        attributes = _integer("num_heads", shape.heads) + _integer("kv_num_heads", shape.kv_heads)
        attributes += _real("scale") + _integer("local_window_size", -1) + _real("softcap")
        attributes += _integer("do_rotary", 0) + _integer("rotary_interleaved", 0)
        self._node("GroupQueryAttention", name, everything, outputs, attributes, _MICROSOFT)
        self._tokens(f"{name}/output_0", widths["q"])
        return self._linear(f"{module}.o_proj", f"{stem}/o_proj", f"{name}/output_0")

    def _head_norm(self, stem: str, tensor: str, source: str, heads: str, width: int) -> str:
        per_head = (_BATCH, f"{_SEQUENCE} * {heads}", self._shape.head_dim)
        weight = self._vector(tensor, f"{stem[1:].replace('/', '.')}.layernorm.weight")
        split = f"{stem}/Reshape_1/output_0"
        self._node("Reshape", f"{stem}/Reshape_1", (source, self._constant([0, -1, self._shape.head_dim])), (split,))
        self._value(split, per_head)
        name = f"{stem}/SimplifiedLayerNormalization"
        normed = f"{name}/output_0"
        self._node("SimplifiedLayerNormalization", name, (split, weight), (normed,), _NORM_ATTRIBUTES)
        self._value(normed, per_head)
        joined = f"{stem}/Reshape_2/output_0"
        self._node("Reshape", f"{stem}/Reshape_2", (normed, self._constant([0, -1, width])), (joined,))
        return self._tokens(joined, width)

    def _mlp(self, module: str, stem: str, source: str) -> str:
        width = self._shape.ffn
        gate, up = (self._linear(f"{module}.{part}_proj", f"{stem}/{part}_proj", source) for part in ("gate", "up"))
        sigmoid, gated, product = (f"{stem}/{node}" for node in ("act_fn/Sigmoid", "act_fn/Mul", "Mul"))
        self._node("Sigmoid", sigmoid, (gate,), (f"{sigmoid}/output_0",))
        self._node("Mul", gated, (gate, f"{sigmoid}/output_0"), (f"{gated}/output_0",))
        self._node("Mul", product, (f"{gated}/output_0", up), (f"{product}/output_0",))
        for name in (sigmoid, gated, product):
            self._tokens(f"{name}/output_0", width)
        return self._linear(f"{module}.down_proj", f"{stem}/down_proj", f"{product}/output_0")

    def _head(self, source: str, tied: bool) -> None:
        decision = self._decisions.get(DECODER_EMBEDDING) if tied else self._take(HEAD)
        if tied and HEAD in self._decisions:
            self._used.add(HEAD)  # a checkpoint may store the tied head too; the graph does not
        matrix = self._lookup(decision)
        if matrix is None:
            return
        name = "/lm_head/MatMul" if matrix.type.is_float else "/lm_head/MatMulNBits"
        if not tied:
            self._product(matrix, name, source, "logits")
        elif matrix.type.is_float:
            inputs = (source, DECODER_EMBEDDING)
            self._node("FusedMatMul", name, inputs, ("logits",), _integer("transB", 1), _MICROSOFT)
        else:
            parts = [f"model.embed_tokens.{part}" for part in ("qweight", *(BESIDE[form] for form in matrix.beside))]
            self._quantized_product(matrix, name, (source, *parts), "logits")


# epsilon, axis -1, stash_type 1
_NORM_ATTRIBUTES = _real("epsilon") + _integer("axis", -1) + _integer("stash_type", 1)
