"""The one file that touches onnxruntime-genai's model builder.

The builder is unversioned internal code: it walks a ``transformers`` module tree and emits one ONNX node after another.
A mixin over its model classes replaces the few methods that read weights, so that a matrix can be a factor pair, can be
quantized node by node, and is described instead of loaded. What the mixin relies on is checked before use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from numpy.typing import NDArray

from acip_export.errors import UnsupportedError
from converters.onnx.genai_builder.families import FAMILIES
from converters.onnx.genai_builder.release import SUPPORTED_VERSION, check_release
from converters.onnx.matrices import BESIDE, Form, Matrix, MatrixPart

if TYPE_CHECKING:
    from converters.onnx.genai_builder.module_tree import Projection, Skeleton

logger = logging.getLogger(__name__)

# Methods of the builder's base class that are overridden or called, with the parameters that are passed by name or
# position. A release that renames one of them would otherwise fail late, or silently take its stock path.
_INTERNALS: dict[str, tuple[str, ...]] = {
    "__init__": ("config", "io_dtype", "onnx_dtype", "ep", "cache_dir", "extra_options"),
    "make_model": ("input_path",),
    "load_weights": ("input_path",),
    "has_lm_head": ("module",),
    "is_fused_rope_supported": (),
    "is_local": ("layer_id",),
    "make_rope_init": ("config",),
    "make_rotary_embedding_caches": ("kwargs",),
    "is_qkv_projection_packable": ("layer_id", "attention"),
    "make_embedding_lookup": ("embedding", "basename", "lm_head"),
    "make_matmul": ("matmul", "basename", "root_input", "kwargs"),
    "make_attention_init": ("config",),
    "make_attention_input_proj": ("layer_id", "attention", "root_input", "kwargs"),
    "make_attention": ("layer_id", "attention", "root_input", "kwargs"),
    "make_qk_norm": ("layer_id", "attention"),
    "make_layer": ("layer_id", "layer"),
    "make_layernorm": ("layer_id", "layernorm", "skip", "simple", "location"),
    "make_mlp": ("layer_id", "mlp", "root_input"),
    "make_mlp_unpacked": ("layer_id", "mlp", "root_input"),
    "make_mlp_proj": ("layer_id", "mlp", "root_input"),
    "make_activation": ("layer_id", "root_input"),
    "make_initializer": ("tensor", "name", "to", "raw"),
    "make_add": ("name", "inputs", "dtype", "shape"),
    "make_mul": ("name", "inputs", "dtype", "shape"),
    "make_split": ("name", "inputs", "outputs", "dtypes", "shapes", "axis", "num_outputs"),
    "make_node": ("op_type", "inputs", "outputs", "name", "domain", "kwargs"),
    "make_reshape": ("name", "inputs", "dtype", "shape"),
    "make_slice": ("name", "inputs", "dtype", "shape"),
    "make_value": ("name", "dtype", "shape"),
    "make_hidden_state_shape": ("seq_dim", "last_dim"),
}
_ATTRIBUTES = (
    "input_shapes",
    "output_shapes",
    "input_names",
    "attention_attrs",
    "embed_attrs",
    "layernorm_attrs",
    "rope_attrs",
    "head_size",
    "layer_types",
    "values",
    "window_size",
)


class _Weightless:
    """Mixin over a builder model class: the graph without the numbers of its matrices.

    Attributes:
        skeleton: the tree to walk. accuracy_level: of every MatMulNBits node.
        parts: what each matrix initializer holds, by initializer name.
    """

    skeleton: Skeleton
    accuracy_level: int
    parts: dict[str, MatrixPart]
    make_node: Callable[..., None]
    make_value: Callable[..., ir.Value]
    make_reshape: Callable[..., None]
    make_slice: Callable[..., None]
    make_hidden_state_shape: Callable[..., list[Any]]
    make_initializer: Callable[..., None]
    io_dtype: ir.DataType
    model: ir.Model
    input_names: dict[str, Any]
    layer_id: int
    weights: Any

    def load_weights(self, input_path: str) -> Any:  # noqa: ARG002 - the builder's signature
        return self.skeleton.model

    def has_lm_head(self, module: Any) -> bool:
        """The stock rule takes any layer with as many outputs as the vocabulary has tokens, a factor included."""
        return module is self.skeleton.model.lm_head

    def is_fused_rope_supported(self) -> bool:
        """Rotary embedding as its own node gives the graph ``position_ids``, which optimum asks for."""
        return False

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:  # noqa: ARG002
        return False

    def make_rope_init(self, config: Any) -> None:
        """Nothing to derive: the tables are those of ``transformers``, so every scaling that it knows is exact."""

    def make_rotary_embedding_caches(self, **_kwargs: Any) -> tuple[str, str]:
        kind, tables = self.skeleton.rotary_tables(self.layer_id)
        names = f"cos_cache{kind}", f"sin_cache{kind}"
        for name, table in zip(names, tables, strict=True):
            if name not in self.model.graph.initializers:
                self.make_initializer(table, name, to=self.io_dtype)
        return names

    def make_embedding_lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:  # noqa: ARG002
        matrix = self.skeleton.embedding
        ids = self.input_names["input_ids"]
        prefix = _initializer_prefix(basename)
        if matrix.type.is_float:
            name = f"{basename}/Gather"
            weight = self._initializer(f"{prefix}.weight", matrix, "rows")
            self.make_node("Gather", inputs=[weight, ids], outputs=[f"{name}/output_0"], name=name)
            return f"{name}/output_0"

        width = matrix.blocks * matrix.block_code_bytes
        if self.skeleton.tied:
            # The head reads the same bytes with the blocks as a dimension of their own.
            codes = f"{basename}/Reshape/output_0"
            blocked = self._initializer(f"{prefix}.qweight", matrix, "codes")
            self.make_reshape(
                f"{basename}/Reshape",
                [blocked, f"/model/constants/INT64/[{matrix.rows}, {width}]"],
                dtype=ir.DataType.UINT8,
                shape=[matrix.rows, width],
            )
        else:
            codes = self._initializer(f"{prefix}.qweight", matrix, "flat_codes")
        name = f"{basename}/GatherBlockQuantized"
        output = f"{name}/output_0"
        self.make_node(
            "GatherBlockQuantized",
            inputs=[codes, ids, *self._beside(prefix, matrix)],
            outputs=[output],
            name=name,
            domain="com.microsoft",
            bits=matrix.bits,
            block_size=matrix.type.block,
            gather_axis=0,
            quantize_axis=1,
        )
        padded = matrix.blocks * matrix.type.block
        if padded == matrix.columns:
            return output
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape(last_dim=padded))
        bounds = [f"/model/constants/INT64/[{value}]" for value in (0, matrix.columns, -1)]
        self.make_slice(
            f"{basename}/Slice",
            [output, *bounds],
            dtype=self.io_dtype,
            shape=self.make_hidden_state_shape(last_dim=matrix.columns),
        )
        return f"{basename}/Slice/output_0"

    def make_matmul(self, matmul: Projection, basename: str, root_input: str, **kwargs: Any) -> str:
        """Emit the projection's chain; returns the name of its last node."""
        stem = basename.removesuffix("/MatMul")
        for label, matrix in matmul.chain:
            last = matrix is matmul.chain[-1][1]
            name = f"{stem}/{label}/MatMul" if label else basename
            if not matrix.type.is_float:
                name += "NBits"
            output = "logits" if last and kwargs.get("logits", False) else f"{name}/output_0"
            self._multiply(matrix, name, root_input, output)
            shape = self.make_hidden_state_shape(seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=matrix.rows)
            self.make_value(output, self.io_dtype, shape=shape)
            root_input = output
        return name

    def _multiply(self, matrix: Matrix, name: str, root_input: str, output: str) -> None:
        prefix = _initializer_prefix(name)
        if not matrix.type.is_float:
            codes = self._initializer(f"{prefix}.qweight", matrix, "codes")
            self.make_node(
                "MatMulNBits",
                inputs=[root_input, codes, *self._beside(prefix, matrix)],
                outputs=[output],
                name=name,
                domain="com.microsoft",
                accuracy_level=self.accuracy_level,
                bits=matrix.bits,
                block_size=matrix.type.block,
                K=matrix.columns,
                N=matrix.rows,
            )
            return
        if (shared := self._shared(matrix, "rows")) is not None:
            # A tied head: the embedding's initializer serves both. A Transpose node would be folded into a copy.
            self.make_node(
                "FusedMatMul",
                inputs=[root_input, shared],
                outputs=[output],
                name=name,
                domain="com.microsoft",
                transB=1,
            )
            return
        weight = self._initializer(f"{prefix}.weight", matrix, "columns")
        self.make_node("MatMul", inputs=[root_input, weight], outputs=[output], name=name)

    def _beside(self, prefix: str, matrix: Matrix) -> list[str]:
        """The inputs that follow a matrix's codes."""
        return [self._initializer(f"{prefix}.{BESIDE[form]}", matrix, form) for form in matrix.beside]

    def _shared(self, matrix: Matrix, form: Form) -> str | None:
        """The initializer with which the embedding already holds these numbers, when the head is tied to it."""
        if not (self.skeleton.tied and matrix == self.skeleton.embedding):
            return None
        return next((name for name, part in self.parts.items() if part == MatrixPart(matrix, form)), None)

    def _initializer(self, name: str, matrix: Matrix, form: Form) -> str:
        """Register an initializer without numbers, or find the one that already holds them."""
        if (shared := self._shared(matrix, form)) is not None:
            return shared
        part = MatrixPart(matrix, form)
        dtype = ir.DataType.from_numpy(part.dtype)
        value = self.make_value(name, dtype, shape=part.shape)
        value.const_value = ir.LazyTensor(_no_numbers, dtype=dtype, shape=ir.Shape(part.shape), name=name)
        self.model.graph.register_initializer(value)
        self.parts[name] = part
        return name


def build_graph(
    skeleton: Skeleton, backend: str, accuracy_level: int
) -> tuple[ir.Model, dict[str, MatrixPart | NDArray[Any]]]:
    """The decoder graph of a skeleton, with its initializers' contents in the order in which they are stored.

    Args:
        skeleton: see :mod:`converters.onnx.genai_builder.module_tree`.
        backend: what runs it, in the builder's names: ``cpu``, ``webgpu``, ``cuda``, ``dml``.
        accuracy_level: 0 computes in float32, 4 rounds activations to int8 (faster).

    Raises:
        UnsupportedError: an architecture, position encoding or builder release that is not supported.
    """
    architecture = type(skeleton.model).__name__
    config = skeleton.model.config
    config.architectures = [architecture]
    family = FAMILIES[config.model_type]
    base = getattr(_builders(), family.builder)
    bases = (_Weightless, *([family.mixin] if family.mixin else []), base)
    item = ir.DataType.FLOAT16 if skeleton.half else ir.DataType.FLOAT
    adapted = type(f"Weightless{base.__name__}", bases, {"skeleton": skeleton})
    with _prints_to_log():
        try:
            model = adapted(config, item, item, backend, "", {"windowed_kv_cache": False})
        except NotImplementedError as reason:
            raise UnsupportedError(f"the ONNX model builder cannot express this {architecture}: {reason}") from reason
        _configure(model, skeleton, accuracy_level)
        model.make_model("")
    graph: ir.Model = model.model
    graph.graph.sort()
    contents: dict[str, MatrixPart | NDArray[Any]] = {
        name: model.parts[name] if name in model.parts else value.const_value.numpy()
        for name, value in graph.graph.initializers.items()
    }
    return graph, contents


def _configure(model: Any, skeleton: Skeleton, accuracy_level: int) -> None:
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing or model.attention_attrs.get("op_type") != "GroupQueryAttention":
        raise UnsupportedError(_incompatible(f"model attributes {missing or '(attention or rotary settings)'}"))
    model.accuracy_level = accuracy_level
    model.parts = {}
    model.layer_types = list(skeleton.layer_types)
    model.window_size = -1 if skeleton.window is None else skeleton.window
    if FAMILIES[skeleton.model.config.model_type].norm_adds_one:
        # The stock factor is rounded to two decimals.
        model.embed_attrs["scale"] = float(model.hidden_size**0.5)
    rotated = 2 * skeleton.rotary_tables(0)[1][0].shape[1]
    partial = rotated != model.head_size
    model.rope_attrs.update(
        partial_rotary_factor=rotated / model.head_size, rotary_embedding_dim=rotated if partial else 0
    )
    for shapes, stem in ((model.input_shapes, "past_key_values"), (model.output_shapes, "present")):
        for kind in ("key", "value"):
            # The stock dimension is symbolic; transformers.js reads a symbol as zero.
            shapes[f"{stem}.{kind}"][-1] = model.head_size


@functools.cache
def _builders() -> Any:
    """The builder's package of model classes, checked."""
    check_release()
    package = Path(importlib.import_module("onnxruntime_genai.models").__file__ or "").parent
    try:
        builders = importlib.import_module("builders")
        base = importlib.import_module("builders.base").Model
    except (ImportError, AttributeError) as reason:
        raise UnsupportedError(_incompatible(f"its module 'builders' ({reason})")) from reason
    finally:
        # Importing it puts generic top-level names on the path of the whole process.
        with contextlib.suppress(ValueError):
            sys.path.remove(str(package))
    check_internals(base)
    return builders


def check_internals(base: type) -> None:
    """Raises UnsupportedError when a method that the adapter overrides or calls is missing or has other parameters."""
    for name, expected in _INTERNALS.items():
        method = getattr(base, name, None)
        if method is None:
            raise UnsupportedError(_incompatible(f"Model.{name}"))
        found = tuple(inspect.signature(method).parameters)[1:]
        if found != expected:
            raise UnsupportedError(_incompatible(f"Model.{name}{expected}, found {found}"))


def _incompatible(what: str) -> str:
    return (
        f"the installed onnxruntime-genai's model builder lacks {what}.\n"
        f"Install the release that this tool was tested with:  pip install 'onnxruntime-genai=={SUPPORTED_VERSION}*'"
    )


def _initializer_prefix(node: str) -> str:
    return node[1:].replace("/", ".")


def _no_numbers() -> ir.TensorProtocol:
    raise AssertionError("initializers are written from the bundle, never from the graph")


@contextlib.contextmanager
def _prints_to_log() -> Iterator[None]:
    """The builder reports with print; standard output belongs to results."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        for line in text.getvalue().splitlines():
            logger.debug("%s", line)
