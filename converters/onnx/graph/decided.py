"""A graph that is made node by node of the plan's decisions: every ONNX graph that is written, and what sizes add up.

Every matrix is a node of its own, a factor pair two of them. Nodes and values are messages of onnx.proto, and a value
goes by its name: a plan measures graphs of thousands of nodes and has no time for objects around them. Initializers
have no numbers here: those are written from the model, never from the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from converters.onnx.matrices import Form, Matrix, MatrixPart, Vector, matrices_of

OPSET, IR_VERSION = 20, 10
MICROSOFT = "com.microsoft"
# What stands in a marked graph for everything that has weights, until a plan decides about it.
MARKS = "acip.mark"
LINEAR, EMBEDDING, PARAMETER = "Linear", "Embedding", "Parameter"

_EMBEDDINGS = "ONNX embeddings are dense, of 4 or 8 bits or float"

Content = MatrixPart | Vector | NDArray[Any]
Contents = dict[str, Content]

_ONNX_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.bool_): TensorProto.BOOL,
}


class DecidedGraph:
    """Nodes, initializers and their contents, in the order in which they are asked for.

    Attributes:
        unused: tensors that the plan decides about and that no node has asked for yet.
        described: shapes of values, of the initializers and apart from them of what nodes make.
    """

    def __init__(self, tensors: Sequence[TensorDecision], accuracy_level: int) -> None:
        self.decisions = {decision.name: decision for decision in tensors}
        self.unused = set(self.decisions)
        self.accuracy_level = accuracy_level
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.contents: Contents = {}
        self.described: list[ValueInfoProto] = []
        self.constants: set[str] = set()
        self._places: dict[MatrixPart, str] = {}

    def node(
        self,
        kind: str,
        inputs: Sequence[str | None],
        name: str,
        domain: str = "",
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node with one output and return the output's name."""
        output = output or f"{name}/output_0"
        node = NodeProto(op_type=kind, name=name, input=[value or "" for value in inputs], output=[output])
        if domain:
            node.domain = domain
        for key, value in attributes.items():
            set_attribute(node.attribute.add(), key, value)
        self.nodes.append(node)
        return output

    def decision(self, tensor: str) -> TensorDecision:
        if tensor not in self.decisions:
            raise UnsupportedError(f"the plan decides nothing for {tensor}, which the model needs; plan again")
        self.unused.discard(tensor)
        return self.decisions[tensor]

    def rows(self, tensor: str) -> int:
        return self.decision(tensor).shape[0]

    def initializer(self, name: str, content: Content) -> str:
        """Register an initializer without numbers; the same name is stored once."""
        if name not in self.initializers:
            self.initializers[name] = TensorProto(
                name=name, dims=content.shape, data_type=_ONNX_TYPES[np.dtype(content.dtype)]
            )
            self.contents[name] = content
        return name

    def constant(self, array: NDArray[Any]) -> str:
        """In the graph itself: shape inference does not look into external data."""
        name = f"/constants/{array.dtype}/{array.tolist()}"
        if name not in self.constants:
            self.constants.add(name)
            self.node("Constant", [], name, value=in_graph(array))
        return f"{name}/output_0"

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        return self.constant(np.array(value, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def vector(self, tensor: str) -> str:
        decision = self.decision(tensor)
        if decision.type != "f32":
            raise UnsupportedError(f"{tensor}: ONNX norms and biases are f32, not {decision.type}; plan again")
        return self.initializer(tensor, Vector(tensor, decision.shape))

    def part(self, matrix: Matrix, form: Form, node: str) -> str:
        """Return the initializer that holds a part of a matrix; ``node`` is the first to ask for it."""
        part = MatrixPart(matrix, form)
        if part not in self._places:
            self._places[part] = self.initializer(self.part_name(part, node), part)
        return self._places[part]

    def part_name(self, part: MatrixPart, node: str) -> str:  # noqa: ARG002 - graphs of the model builder name by it
        suffix = f".{part.form}" if part.form in ("codes", "scales", "zeros") else ""
        return f"{part.matrix.tensor}{suffix}"

    def beside(self, matrix: Matrix, node: str) -> list[str]:
        """The inputs that follow a matrix's codes."""
        return [self.part(matrix, form, node) for form in matrix.beside]

    def table(self, tensor: str) -> str:
        """A float table, by row."""
        matrix = self.single(tensor)
        if not matrix.type.is_float:
            raise UnsupportedError(f"{tensor}: ONNX keeps this table in f32, not {matrix.type.name}; plan again")
        return self.part(matrix, "rows", tensor)

    def single(self, tensor: str) -> Matrix:
        chain = matrices_of(self.decision(tensor))
        if len(chain) != 1:
            raise UnsupportedError(f"{tensor}: {_EMBEDDINGS}; plan again")
        return chain[0][1]

    def describe(self, value: str, like: ValueInfoProto | None, columns: int) -> None:
        """Say that ``value`` has the shape of ``like`` but for its last dimension; without ``like`` nothing is said."""
        if like is None:
            return
        info = ValueInfoProto()
        info.CopyFrom(like)
        info.name = value
        info.type.tensor_type.shape.dim[-1].dim_value = columns
        self.described.append(info)

    def flat_codes(self, matrix: Matrix, name: str) -> str:
        """A quantized embedding's codes by row, of an initializer with the blocks as a dimension of their own.

        So that a tied head can read the same bytes.
        """
        codes, flat = self.part(matrix, "codes", name), matrix.blocks * matrix.block_code_bytes
        return self.node("Reshape", [codes, self.integers(matrix.rows, flat)], f"{name}/Reshape")

    def lookup(self, tensor: str, ids: str, name: str, like: ValueInfoProto | None = None) -> str:
        """Rows of an embedding that may be quantized.

        Args:
            like: type and shape of the result, where values are described.
        """
        matrix = self.single(tensor)
        if matrix.type.is_float:
            rows = self.node("Gather", [self.part(matrix, "rows", name), ids], f"{name}/Gather")
            self.describe(rows, like, matrix.columns)
            return rows
        if matrix.bits not in (4, 8):
            raise UnsupportedError(f"{tensor}: {_EMBEDDINGS}; plan again")
        codes = self.flat_codes(matrix, name)
        rows = self.node(
            "GatherBlockQuantized",
            [codes, ids, *self.beside(matrix, name)],
            f"{name}/GatherBlockQuantized",
            MICROSOFT,
            bits=matrix.bits,
            block_size=matrix.type.block,
            gather_axis=0,
            quantize_axis=1,
        )
        padded = matrix.blocks * matrix.type.block
        self.describe(rows, like, padded)
        if padded == matrix.columns:
            return rows
        bounds = [self.integers(value) for value in (0, matrix.columns, -1)]
        rows = self.node("Slice", [rows, *bounds], f"{name}/Slice")
        self.describe(rows, like, matrix.columns)
        return rows

    def stem(self, mark: NodeProto, tensor: str) -> str:  # noqa: ARG002 - graphs of the model builder name by it
        """What the names of the nodes start with that take the place of a mark."""
        return f"/{tensor.removesuffix('.weight').replace('.', '/')}"

    def linear(self, module: str, x: str) -> str:
        """A linear layer: its products and the bias."""
        stem = f"/{module.replace('.', '/')}"
        x = self.chain(f"{module}.weight", x, stem)
        if f"{module}.bias" not in self.decisions:
            return x
        return self.node("Add", [x, self.vector(f"{module}.bias")], f"{stem}/Add")

    def chain(
        self, tensor: str, x: str, stem: str, output: str | None = None, like: ValueInfoProto | None = None
    ) -> str:
        """One product, or two for a factor pair.

        Args:
            output: name of the result, if it is to have one of its own.
            like: type and shape of the result, where values are described.
        """
        *first, (last, matrix) = matrices_of(self.decision(tensor))
        for label, inner in first:
            x = self.product(inner, x, f"{stem}/{label}/MatMul", like=like)
        return self.product(matrix, x, f"{stem}/{last}/MatMul" if last else f"{stem}/MatMul", output, like)

    def product(
        self, matrix: Matrix, x: str, name: str, output: str | None = None, like: ValueInfoProto | None = None
    ) -> str:
        if matrix.type.is_float:
            product = self.node("MatMul", [x, self.part(matrix, "columns", name)], name, output=output)
        else:
            name = f"{name}NBits"
            product = self.node(
                "MatMulNBits",
                [x, self.part(matrix, "codes", name), *self.beside(matrix, name)],
                name,
                MICROSOFT,
                output,
                accuracy_level=self.accuracy_level,
                bits=matrix.bits,
                block_size=matrix.type.block,
                K=matrix.columns,
                N=matrix.rows,
            )
        if output is None:
            self.describe(product, like, matrix.rows)
        return product

    def norm(self, module: str, x: str, epsilon: float) -> str:
        scale, bias = self.vector(f"{module}.weight"), self.vector(f"{module}.bias")
        name = f"/{module.replace('.', '/')}/LayerNormalization"
        return self.node("LayerNormalization", [x, scale, bias], name, epsilon=epsilon, axis=-1)

    def head(
        self, tensor: str, x: str, name: str, output: str | None = None, like: ValueInfoProto | None = None
    ) -> str:
        """Logits by a matrix that an embedding may hold already; see :meth:`chain` for the arguments."""
        matrix = self.single(tensor)
        if MatrixPart(matrix, "rows") not in self._places:
            return self.product(matrix, x, name, output, like)
        rows = self.part(matrix, "rows", name)
        return self.product_of_rows(rows, matrix, x, name, output, like)

    def product_of_rows(
        self, rows: str, matrix: Matrix, x: str, name: str, output: str | None, like: ValueInfoProto | None
    ) -> str:
        """A product with an initializer that serves an embedding too. A Transpose node would be folded into a copy."""
        product = self.node("FusedMatMul", [x, rows], name, MICROSOFT, output, transB=1)
        if output is None:
            self.describe(product, like, matrix.rows)
        return product

    def write(self, graph: onnx.GraphProto) -> None:
        """Put nodes, initializers and descriptions into a message that has its inputs and outputs."""
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.initializers.values())
        graph.value_info.extend(_described(tensor) for tensor in self.initializers.values())
        graph.value_info.extend(self.described)


@lru_cache(maxsize=100_000)
def shaped(name: str, kind: int, shape: tuple[int | str, ...]) -> ValueInfoProto:
    """Describe a value: its type, and a number or a symbol for every dimension. Callers must not change it.

    A plan measures a few graphs of which most values are the same.
    """
    info = ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = kind
    # A value without dimensions has a shape too.
    info.type.tensor_type.shape.SetInParent()
    for size in shape:
        dimension = info.type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dimension.dim_param = size
        else:
            dimension.dim_value = size
    return info


def _described(tensor: TensorProto) -> ValueInfoProto:
    return shaped(tensor.name, tensor.data_type, tuple(tensor.dims))


def set_attribute(attribute: AttributeProto, name: str, value: Any) -> None:
    """Give an attribute of a node its name and value."""
    attribute.name = name
    if isinstance(value, int):
        attribute.i, attribute.type = value, AttributeProto.INT
    elif isinstance(value, float):
        attribute.f, attribute.type = value, AttributeProto.FLOAT
    elif isinstance(value, str):
        attribute.s, attribute.type = value.encode(), AttributeProto.STRING
    elif isinstance(value, TensorProto):
        attribute.t.CopyFrom(value)
        attribute.type = AttributeProto.TENSOR
    else:
        attribute.ints.extend(value)
        attribute.type = AttributeProto.INTS


def in_graph(array: NDArray[Any], name: str = "") -> TensorProto:
    """The message of a small tensor that keeps its numbers."""
    tensor = TensorProto(dims=array.shape, data_type=_ONNX_TYPES[array.dtype], raw_data=array.tobytes())
    if name:
        tensor.name = name
    return tensor
