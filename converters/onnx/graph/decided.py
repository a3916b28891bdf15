"""A graph that is made node by node of the plan's decisions: what encoders and traced models share.

Every matrix is a node of its own, a factor pair two of them. Initializers have no numbers: those are written from the
bundle, never from the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from converters.onnx.matrices import Form, Matrix, MatrixPart, Vector, matrices_of

OPSET, IR_VERSION = 20, 10
MICROSOFT = "com.microsoft"
# What stands in a traced graph for everything that has weights, until a plan decides about it.
MARKS = "acip.mark"
LINEAR, EMBEDDING, PARAMETER = "Linear", "Embedding", "Parameter"

Contents = dict[str, MatrixPart | Vector | NDArray[Any]]

# Numbers of a traced graph up to this size stay in it, where shape inference sees them.
_INLINE_BYTES = 1024


class DecidedGraph:
    """Nodes, initializers and their contents, in the order in which they are asked for.

    Attributes:
        unused: tensors that the plan decides about and that no node has asked for yet.
    """

    def __init__(self, tensors: Sequence[TensorDecision], accuracy_level: int) -> None:
        self.decisions = {decision.name: decision for decision in tensors}
        self.unused = set(self.decisions)
        self.accuracy_level = accuracy_level
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.contents: Contents = {}
        self.constants: dict[str, ir.Value] = {}

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        output = ir.Value(name=f"{name}/output_0")
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        self.nodes.append(ir.Node(domain, kind, inputs, attrs, outputs=[output], name=name))
        return output

    def decision(self, tensor: str) -> TensorDecision:
        if tensor not in self.decisions:
            raise UnsupportedError(f"the plan decides nothing for {tensor}, which the model needs; plan again")
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

    def take(self, value: ir.Value) -> None:
        """An initializer of another graph, with its numbers."""
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.nbytes <= _INLINE_BYTES:
            made = self.node("Constant", [], f"/constants/{value.name}", value=ir.tensor(array))
            ir.convenience.replace_all_uses_with(value, made)
        else:
            assert value.name is not None
            self.initializers[value.name], self.contents[value.name] = value, array

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
        if decision.type != "f32":
            raise UnsupportedError(f"{tensor}: ONNX norms and biases are f32, not {decision.type}; plan again")
        return self.initializer(tensor, Vector(tensor, decision.shape))

    def part(self, matrix: Matrix, form: Form) -> ir.Value:
        suffix = f".{form}" if form in ("codes", "scales", "zeros") else ""
        return self.initializer(f"{matrix.tensor}{suffix}", MatrixPart(matrix, form))

    def beside(self, matrix: Matrix) -> list[ir.Value]:
        """The inputs that follow a matrix's codes."""
        return [self.part(matrix, form) for form in matrix.beside]

    def table(self, tensor: str) -> ir.Value:
        """A float table, by row."""
        matrix = self.single(tensor)
        if not matrix.type.is_float:
            raise UnsupportedError(f"{tensor}: ONNX keeps this table in f32, not {matrix.type.name}; plan again")
        return self.part(matrix, "rows")

    def single(self, tensor: str) -> Matrix:
        chain = matrices_of(self.decision(tensor))
        if len(chain) != 1:
            raise UnsupportedError(f"{tensor}: ONNX embeddings are dense; plan again")
        return chain[0][1]

    def lookup(self, tensor: str, ids: ir.Value, name: str) -> ir.Value:
        """Rows of an embedding that may be quantized."""
        matrix = self.single(tensor)
        if matrix.type.is_float:
            return self.node("Gather", [self.part(matrix, "rows"), ids], f"{name}/Gather")
        if matrix.bits not in (4, 8):
            raise UnsupportedError(f"{tensor}: ONNX embeddings are float or of 4 or 8 bits, not {matrix.bits}")
        flat = self.integers(matrix.rows, matrix.blocks * matrix.block_code_bytes)
        # With the blocks as a dimension of their own, so that a tied head can read the same bytes.
        codes = self.node("Reshape", [self.part(matrix, "codes"), flat], f"{name}/Reshape")
        found = self.node(
            "GatherBlockQuantized",
            [codes, ids, *self.beside(matrix)],
            f"{name}/GatherBlockQuantized",
            MICROSOFT,
            bits=matrix.bits,
            block_size=matrix.type.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if matrix.blocks * matrix.type.block == matrix.columns:
            return found
        bounds = [self.integers(value) for value in (0, matrix.columns, -1)]
        return self.node("Slice", [found, *bounds], f"{name}/Slice")

    def linear(self, module: str, x: ir.Value) -> ir.Value:
        """A linear layer: its products and the bias."""
        stem = f"/{module.replace('.', '/')}"
        x = self.chain(f"{module}.weight", x, stem)
        if f"{module}.bias" not in self.decisions:
            return x
        return self.node("Add", [x, self.vector(f"{module}.bias")], f"{stem}/Add")

    def chain(self, tensor: str, x: ir.Value, stem: str) -> ir.Value:
        """One product, or two for a factor pair."""
        for label, matrix in matrices_of(self.decision(tensor)):
            x = self.product(matrix, x, f"{stem}/{label}/MatMul" if label else f"{stem}/MatMul")
        return x

    def product(self, matrix: Matrix, x: ir.Value, name: str) -> ir.Value:
        if matrix.type.is_float:
            return self.node("MatMul", [x, self.part(matrix, "columns")], name)
        return self.node(
            "MatMulNBits",
            [x, self.part(matrix, "codes"), *self.beside(matrix)],
            f"{name}NBits",
            MICROSOFT,
            accuracy_level=self.accuracy_level,
            bits=matrix.bits,
            block_size=matrix.type.block,
            K=matrix.columns,
            N=matrix.rows,
        )

    def norm(self, module: str, x: ir.Value, epsilon: float) -> ir.Value:
        scale, bias = self.vector(f"{module}.weight"), self.vector(f"{module}.bias")
        name = f"/{module.replace('.', '/')}/LayerNormalization"
        return self.node("LayerNormalization", [x, scale, bias], name, epsilon=epsilon, axis=-1)

    def head(self, tensor: str, x: ir.Value, name: str) -> ir.Value:
        """Logits by a matrix that an embedding may hold already."""
        matrix = self.single(tensor)
        if matrix.type.is_float and tensor in self.initializers:
            # The embedding's initializer serves both. A Transpose node would be folded into a copy.
            return self.node("FusedMatMul", [x, self.part(matrix, "rows")], name, MICROSOFT, transB=1)
        return self.product(matrix, x, name)


def _no_numbers() -> ir.TensorProtocol:
    raise AssertionError("initializers are written from the bundle, never from the graph")
