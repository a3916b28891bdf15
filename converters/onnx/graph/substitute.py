"""The graph of any other architecture: traced by torch.onnx, with the plan's nodes in place of its marks.

Tracing takes seconds to minutes and depends on the configuration alone, so it is done once and kept in the user's cache
directory; a plan costs a walk over the nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.io.atomic import keep, user_cache
from acip_export.model.checkpoint import ModelShape
from acip_export.model.tensor_names import HEAD
from acip_export.version import __version__
from converters.onnx.graph.decided import EMBEDDING, IR_VERSION, LINEAR, MARKS, MICROSOFT, OPSET, Contents, DecidedGraph

# What a trace depends on beside the configuration and the file that marks.
_TRACERS = ("torch", "transformers", "onnxscript", "onnx-ir")


def build_traced(
    config: Mapping[str, Any],
    shape: ModelShape,
    tensors: tuple[TensorDecision, ...],
    context: int,
    accuracy_level: int,
) -> tuple[ir.Model, Contents]:
    """The decoder graph, and the contents of its initializers in the order in which they are stored.

    Raises:
        UnsupportedError: transformers or torch.onnx cannot do this architecture, or a decision has no place in it.
        MissingExtraError: onnxscript is not installed.
    """
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(traced(config, context)))
    _check_cache(model.graph, shape)
    return _decided(model.graph, tensors, accuracy_level, shape.tied_embeddings)


def traced(config: Mapping[str, Any], context: int) -> bytes:
    """The marked graph of a configuration, see :mod:`converters.onnx.tracing.trace`; asked for again, it is there.

    Raises:
        UnsupportedError, MissingExtraError: as :func:`build_traced`.
    """
    return _traced(_key(config, context))


def is_traced(config: Mapping[str, Any], context: int) -> bool:
    """Whether :func:`traced` will only read."""
    return _file(_key(config, context)).is_file()


def _key(config: Mapping[str, Any], context: int) -> str:
    from acip_export.model.torch_model import with_fixed_positions

    return json.dumps(with_fixed_positions(dict(config), context), sort_keys=True)


def _file(config: str) -> Path:
    versions = []
    for package in _TRACERS:
        try:
            versions.append(version(package))
        except PackageNotFoundError:
            versions.append("")
    source = Path(__file__).with_name("marked.py").read_bytes()
    key = hashlib.sha256(source + json.dumps([__version__, *versions, config]).encode()).hexdigest()
    return user_cache() / "traces" / f"{key}.onnx"


@lru_cache(maxsize=2)
def _traced(config: str) -> bytes:
    file = _file(config)
    with contextlib.suppress(OSError, DecodeError):
        kept = file.read_bytes()
        if onnx.ModelProto.FromString(kept).graph.node:
            return kept
    made = _trace(config)
    keep(file, made, "the graph is traced")
    return made


def _trace(config: str) -> bytes:
    from acip_export.model.torch_model import causal_lm
    from converters.onnx.tracing.trace import trace_decoder, without_weights

    fields = json.loads(config)
    kind = fields.get("model_type")
    try:
        with without_weights():
            model = causal_lm(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise UnsupportedError(f"transformers cannot build a {kind} model of this config.json: {reason}") from reason
    return trace_decoder(model)


def _check_cache(graph: ir.Graph, shape: ModelShape) -> None:
    """The plan counts the cache by the configuration; the model says what it really is."""
    expected = [(shape.kv_heads, shape.head_dim)] * (2 * shape.layers)
    caches = [value.shape for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    found = [(sizes[1], sizes[3]) for sizes in caches if sizes is not None]
    if found != expected:
        raise UnsupportedError(
            f"the KV cache of this {shape.architecture} is {found[:1]} heads and width in {len(found)} tensors, its "
            f"config.json says {expected[:1]} in {len(expected)}; no ONNX export for it"
        )
    if shape.fused_attention and not any(node.op_type == "GroupQueryAttention" for node in graph):
        raise UnsupportedError(
            f"this {shape.architecture} is planned with attention in one node per layer, and transformers "
            f"{version('transformers')} computes it another way; no ONNX export for it"
        )


def _decided(
    old: ir.Graph, tensors: tuple[TensorDecision, ...], accuracy_level: int, tied: bool
) -> tuple[ir.Model, Contents]:
    graph = DecidedGraph(tensors, accuracy_level)
    embedding = _embedding_of(old) if tied else None
    if tied:
        graph.unused.discard(HEAD)
    nodes = list(old)
    old.remove(nodes, safe=False)
    computed = list(old.initializers.values())
    old.initializers.clear()
    for value in computed:
        graph.take(value)
    for node in nodes:
        if node.domain != MARKS:
            graph.nodes.append(node)
            continue
        (output,) = node.outputs
        made = _unmarked(graph, node, embedding)
        if output.is_graph_output():
            made.shape, made.type, made.name = output.shape, output.type, output.name
        ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    if graph.unused:
        raise UnsupportedError(f"ONNX has no place for {min(graph.unused)} in this model; the config says otherwise")
    old.extend(graph.nodes)
    for value in graph.initializers.values():
        old.register_initializer(value)
    old.name = "decoder"
    old.opset_imports.clear()
    old.opset_imports.update({"": OPSET, MICROSOFT: 1})
    old.sort()
    return ir.Model(old, ir_version=IR_VERSION), graph.contents


def _unmarked(graph: DecidedGraph, node: ir.Node, embedding: str | None) -> ir.Value:
    tensor = node.attributes["tensor"].as_string()
    module = tensor.removesuffix(".weight")
    stem = f"/{module.replace('.', '/')}"
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type == EMBEDDING:
        return graph.lookup(tensor, inputs[0], stem)
    if node.op_type == LINEAR:
        if embedding is not None and tensor == HEAD:
            return graph.head(embedding, inputs[0], f"{stem}/MatMul")
        return graph.chain(tensor, inputs[0], stem)
    return graph.vector(tensor)


def _embedding_of(graph: ir.Graph) -> str:
    """The tensor of the first embedding that reads the tokens."""
    ids = graph.inputs[0]
    for node in graph:
        if node.domain == MARKS and node.op_type == EMBEDDING and _reads(node.inputs[0], ids):
            found: str = node.attributes["tensor"].as_string()
            return found
    raise UnsupportedError("the head is tied to an embedding, and no embedding reads the tokens")


def _reads(value: ir.Value | None, wanted: ir.Value) -> bool:
    """Through the views that models make of their tokens."""
    while value is not None and value is not wanted:
        producer = value.producer()
        value = None if producer is None else producer.inputs[0]
    return value is wanted
