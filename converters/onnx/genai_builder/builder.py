"""Build decoder graphs with onnxruntime-genai's model builder; no other file touches it.

The builder is unversioned internal code: it walks a ``transformers`` module tree and emits one ONNX node after another.
A mixin over its model classes replaces the few methods that read matrices with ones that leave a mark, so that the plan
decides later what each becomes. What the mixin relies on is checked before use.
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

from acip_export.errors import UnsupportedError
from acip_export.model.tensor_names import DECODER_EMBEDDING
from converters.onnx.genai_builder.families import FAMILIES
from converters.onnx.genai_builder.release import SUPPORTED_RELEASE, check_release
from converters.onnx.graph.decided import EMBEDDING, LINEAR, MARKS

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
    """Mixin over a builder's model class that puts marks into the graph in place of matrices.

    Attributes:
        skeleton: the tree of modules without weights that the builder walks.
    """

    skeleton: Skeleton
    make_node: Callable[..., None]
    make_value: Callable[..., ir.Value]
    make_hidden_state_shape: Callable[..., list[Any]]
    make_initializer: Callable[..., None]
    io_dtype: ir.DataType
    model: ir.Model
    input_names: dict[str, Any]
    layer_id: int
    weights: Any

    def load_weights(self, input_path: str) -> Any:  # noqa: ARG002 - the builder's signature
        """Return the tree without weights, where the stock method loads the model."""
        return self.skeleton.model

    def has_lm_head(self, module: Any) -> bool:
        """Tell whether this is the head. The stock rule takes every layer with as many outputs as the vocabulary."""
        return module is self.skeleton.model.lm_head

    def is_fused_rope_supported(self) -> bool:
        """Keep rotary embedding as a node of its own: the graph then has ``position_ids``, which optimum asks for."""
        return False

    def is_qkv_projection_packable(self, layer_id: int, attention: Any) -> bool:  # noqa: ARG002
        """Keep q, k and v apart: the plan decides about each."""
        return False

    def make_rope_init(self, config: Any) -> None:
        """Derive nothing: the tables come from ``transformers``, so every scaling that it knows is exact."""

    def make_rotary_embedding_caches(self, **_kwargs: Any) -> tuple[str, str]:
        """Store the tables that ``transformers`` computes; returns their names."""
        kind, tables = self.skeleton.rotary_tables(self.layer_id)
        names = f"cos_cache{kind}", f"sin_cache{kind}"
        for name, table in zip(names, tables, strict=True):
            if name not in self.model.graph.initializers:
                self.make_initializer(table, name, to=self.io_dtype)
        return names

    def make_embedding_lookup(self, embedding: Any, basename: str, lm_head: Any) -> str:  # noqa: ARG002
        """Mark the lookup; returns the name of its output."""
        output = f"{basename}/output_0"
        ids = self.input_names["input_ids"]
        self.make_node(EMBEDDING, [ids], [output], name=basename, domain=MARKS, tensor=DECODER_EMBEDDING)
        return output

    def make_matmul(self, matmul: Projection, basename: str, root_input: str, **kwargs: Any) -> str:
        """Mark the projection; returns the name of its node."""
        output = "logits" if kwargs.get("logits", False) else f"{basename}/output_0"
        self.make_node(LINEAR, [root_input], [output], name=basename, domain=MARKS, tensor=matmul.tensor)
        seq_dim = kwargs.get("seq_dim", "sequence_length")
        self.make_value(output, self.io_dtype, self.make_hidden_state_shape(seq_dim=seq_dim, last_dim=matmul.rows))
        return basename


def build_marked(skeleton: Skeleton, backend: str) -> ir.Model:
    """Return the decoder graph of a skeleton, with marks for its matrices.

    Args:
        skeleton: see :mod:`converters.onnx.genai_builder.module_tree`.
        backend: the builder's name for what runs it: ``cpu``, ``webgpu``, ``cuda``, ``dml``.

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
        _configure(model, skeleton)
        model.make_model("")
    graph: ir.Model = model.model
    graph.graph.sort()
    return graph


def _configure(model: Any, skeleton: Skeleton) -> None:
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing or model.attention_attrs.get("op_type") != "GroupQueryAttention":
        raise UnsupportedError(_incompatible(f"model attributes {missing or '(attention or rotary settings)'}"))
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
    """Import the builder's package of model classes, and check it."""
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
    """Check that the methods that the adapter overrides or calls are there, with the parameters that it knows.

    Raises:
        UnsupportedError: one is missing or has other parameters.
    """
    for name, expected in _INTERNALS.items():
        method = getattr(base, name, None)
        if method is None:
            raise UnsupportedError(_incompatible(f"Model.{name}"))
        parameters = tuple(inspect.signature(method).parameters)[1:]
        if parameters != expected:
            raise UnsupportedError(_incompatible(f"Model.{name}{expected}, found {parameters}"))


def _incompatible(what: str) -> str:
    return (
        f"the installed onnxruntime-genai's model builder lacks {what}.\n"
        f"Install the release that this tool was tested with:  pip install 'onnxruntime-genai=={SUPPORTED_RELEASE}.*'"
    )


@contextlib.contextmanager
def _prints_to_log() -> Iterator[None]:
    """Send what the builder prints to the log: standard output belongs to results."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        for line in text.getvalue().splitlines():
            logger.debug("%s", line)
