"""The graph of an architecture that onnxruntime-genai's model builder knows: its nodes, the plan's for the matrices.

Light: the builder, torch and transformers are imported when a marked graph is not there yet, or is to have numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from acip_export.artifacts.plan import Serving, TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.formats.protocol import DEFAULT_BACKEND
from acip_export.io.frozen import thawed
from acip_export.model.shape import ModelShape
from converters.onnx.backends import STATIC_CACHE
from converters.onnx.graph.decided import Contents, DecidedGraph, in_graph, shaped
from converters.onnx.graph.marked import Recipe, marked_graph
from converters.onnx.graph.substitute import substitute
from converters.onnx.matrices import BESIDE, Matrix, MatrixPart

if TYPE_CHECKING:
    from converters.onnx.genai_builder.module_tree import ReadVector

Numbers = Mapping[str, NDArray[Any]]

# Names of the norms and biases that the graph holds, as JSON.
_VECTORS = "acip.vectors"
# What holds one row for each position of the context.
_TABLES = ("cos_cache", "sin_cache")
_PACKAGES = ("onnxruntime-genai", "transformers", "torch", "onnx-ir")
_SOURCES = tuple(
    f"{name}.py"
    for name in (
        "genai_builder/builder", "genai_builder/decoder", "genai_builder/families", "genai_builder/module_tree",
        "graph/static_cache",
    )
)  # fmt: skip


def build_decoder(
    config: Mapping[str, Any],
    shape: ModelShape,
    tensors: tuple[TensorDecision, ...],
    serving: Serving,
    accuracy_level: int,
    read_vector: ReadVector | None,
) -> tuple[onnx.ModelProto, Contents]:
    """The decoder graph, and the contents of its initializers in the order in which they are stored.

    Args:
        read_vector: gives norms and biases by name; ``None``: the graph's own numbers are left out of the contents.

    Raises:
        UnsupportedError: the builder cannot do this model or is another release, or a decision has no place in it.
    """
    half = serving.cache_type_k == "f16"
    recipe = marked_decoder(config, shape, serving.backend, half, serving.context)
    graph = _DecoderGraph(tensors, accuracy_level, shape.tied_embeddings, serving.backend == STATIC_CACHE)
    numbers: Numbers = {}
    if read_vector is None:
        marked = marked_graph(recipe)
    else:

        def read(name: str) -> Any:
            return read_vector(graph.decision(name).name)

        marked, numbers = _build({**json.loads(recipe.settings), "context": serving.context}, read)

    def keep(tensor: TensorProto) -> None:
        graph.keep(tensor, serving.context, numbers.get(tensor.name))

    (vectors,) = (json.loads(entry.value) for entry in marked.metadata_props if entry.key == _VECTORS)
    graph.check_vectors(vectors, "f16" if half else "f32")
    return substitute(marked, graph, shape.tied_embeddings, {}, keep), graph.contents


def marked_decoder(config: Mapping[str, Any], shape: ModelShape, backend: str, half: bool, context: int) -> Recipe:
    """What the marked graph of a configuration depends on. The context is no part of it, unless the cache is static."""
    window, static = shape.sliding_window, backend == STATIC_CACHE
    settings = {
        "config": thawed(config),
        # The builder knows float16 with fused attention for graphics cards only, and phones as any processor.
        "provider": {STATIC_CACHE: "webgpu", "mobile": DEFAULT_BACKEND}.get(backend, backend),
        "half": half,
        "static": static,
        # One of the contexts in which the same layers have the same windows.
        "context": context if static else 1 if window is None or context <= window else window + 1,
    }
    return Recipe(json.dumps(settings, sort_keys=True), _PACKAGES, _SOURCES, _make)


def _make(settings: str) -> bytes:
    model, _ = _build(json.loads(settings), None)
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def _build(settings: dict[str, Any], read_vector: ReadVector | None) -> tuple[onnx.ModelProto, Numbers]:
    """The marked graph, whose initializers have no numbers, and those numbers."""
    import onnx_ir as ir

    from converters.onnx.genai_builder.builder import build_marked
    from converters.onnx.genai_builder.module_tree import make_skeleton

    skeleton = make_skeleton(settings["config"], settings["half"], settings["context"], read_vector)
    graph = build_marked(skeleton, settings["provider"])
    if settings["static"]:
        from converters.onnx.graph.static_cache import with_static_cache

        with_static_cache(graph, settings["context"])
    values = dict(graph.graph.initializers)
    graph.graph.initializers.clear()
    model = ir.serde.serialize_model(graph)
    numbers: dict[str, NDArray[Any]] = {}
    for name, value in values.items():
        tensor = value.const_value
        assert tensor is not None
        sizes = list(tensor.shape.numpy())
        if name.startswith(_TABLES):
            sizes[0] = 0
        model.graph.initializer.add(name=name, data_type=tensor.dtype.value, dims=sizes)
        if read_vector is not None:
            numbers[name] = tensor.numpy()
    model.metadata_props.add(key=_VECTORS, value=json.dumps(skeleton.vectors))
    return model, numbers


class _DecoderGraph(DecidedGraph):
    """With the names, and the descriptions of constants, that the builder gives.

    Args:
        tied: the head reads the embedding's bytes.
        standard: with operators of ONNX itself wherever there are any.
    """

    def __init__(self, tensors: Sequence[TensorDecision], accuracy_level: int, tied: bool, standard: bool) -> None:
        super().__init__(tensors, accuracy_level)
        self._tied, self._standard = tied, standard

    def check_vectors(self, names: Sequence[str], form: str) -> None:
        """Raises UnsupportedError unless the plan stores the norms and biases as the graph does."""
        for name in names:
            decided = self.decision(name).type
            if decided != form:
                raise UnsupportedError(f"{name}: norms and biases of this graph are {form}, not {decided}; plan again")

    def keep(self, tensor: TensorProto, context: int, numbers: NDArray[Any] | None) -> None:
        """Take over an initializer of the builder's; rows that are 0 are as many as the context."""
        if numbers is not None:
            self.initializer(tensor.name, numbers)
            return
        kept = TensorProto()
        kept.CopyFrom(tensor)
        kept.dims[:] = [size or context for size in tensor.dims]
        self.initializers[tensor.name] = kept

    def stem(self, mark: NodeProto, tensor: str) -> str:  # noqa: ARG002
        return str(mark.name.removesuffix("/MatMul"))

    def constant(self, array: NDArray[Any]) -> str:
        name = f"/model/constants/INT64/{array.tolist()}"
        if name not in self.constants:
            self.constants.add(name)
            self.node(
                "Constant", [], name.replace("constants", "constant_nodes"), "", name, value=in_graph(array, name)
            )
            # As the builder describes its own, whatever their shape.
            self.described.append(shaped(name, TensorProto.INT64, ()))
        return name

    def part_name(self, part: MatrixPart, node: str) -> str:
        kind = "weight" if part.form in ("rows", "columns") else BESIDE.get(part.form, "qweight")
        return f"{node[1:].replace('/', '.')}.{kind}"

    def flat_codes(self, matrix: Matrix, name: str) -> str:
        if not self._tied:
            return self.part(matrix, "flat_codes", name)
        codes = super().flat_codes(matrix, name)
        self.described.append(shaped(codes, TensorProto.UINT8, MatrixPart(matrix, "flat_codes").shape))
        return codes

    def product_of_rows(
        self, rows: str, matrix: Matrix, x: str, name: str, output: str | None, like: onnx.ValueInfoProto | None
    ) -> str:
        if not self._standard:
            return super().product_of_rows(rows, matrix, x, name, output, like)
        turned = self.node("Transpose", [rows], f"{name}/Transpose", perm=[1, 0])
        return self.node("MatMul", [x, turned], f"{name}/MatMul", output=output)
