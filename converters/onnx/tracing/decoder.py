"""The graph of any architecture that the model builder does not know: traced by torch.onnx, see :mod:`.trace`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import onnx

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UnsupportedError
from acip_export.io.frozen import thawed
from acip_export.model.checkpoint import ModelShape
from converters.onnx.graph.decided import IR_VERSION, MICROSOFT, OPSET, Contents, DecidedGraph
from converters.onnx.graph.marked import Recipe, marked_graph
from converters.onnx.graph.substitute import substitute

# Numbers of a traced graph up to this size stay in it, where shape inference sees them.
_INLINE_BYTES = 1024


def build_traced(
    config: Mapping[str, Any],
    shape: ModelShape,
    tensors: tuple[TensorDecision, ...],
    context: int,
    accuracy_level: int,
) -> tuple[onnx.ModelProto, Contents]:
    """The decoder graph, and the contents of its initializers in the order in which they are stored.

    Raises:
        UnsupportedError: transformers or torch.onnx cannot do this architecture, or a decision has no place in it.
        MissingExtraError: onnxscript is not installed.
    """
    marked = marked_graph(traced(config, context))
    _check_cache(marked.graph, shape)
    graph = DecidedGraph(tensors, accuracy_level)
    renamed = {tensor.name: _take(graph, tensor) for tensor in marked.graph.initializer}
    model = substitute(marked, graph, shape.tied_embeddings, renamed)
    model.graph.name, model.ir_version = "decoder", IR_VERSION
    del model.opset_import[:]
    for domain, release in (("", OPSET), (MICROSOFT, 1)):
        model.opset_import.add(domain=domain, version=release)
    return model, graph.contents


def traced(config: Mapping[str, Any], context: int) -> Recipe:
    """What the marked graph of a configuration depends on."""
    from acip_export.model.torch_model import with_fixed_positions

    settings = json.dumps(thawed(with_fixed_positions(config, context)), sort_keys=True)
    packages = ("torch", "transformers", "onnxscript", "onnx-ir")
    return Recipe(settings, packages, ("tracing/trace.py",), _trace)


def _trace(settings: str) -> bytes:
    from acip_export.model.torch_model import causal_lm
    from converters.onnx.tracing.trace import trace_decoder, without_weights

    fields = json.loads(settings)
    kind = fields.get("model_type")
    try:
        with without_weights():
            model = causal_lm(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        raise UnsupportedError(f"transformers cannot build a {kind} model of this config.json: {reason}") from reason
    return trace_decoder(model)


def _check_cache(graph: onnx.GraphProto, shape: ModelShape) -> None:
    """The plan counts the cache by the configuration; the model says what it really is."""
    expected = [(shape.kv_heads, shape.head_dim)] * (2 * shape.layers)
    caches = [value.type.tensor_type.shape.dim for value in graph.input if value.name.startswith("past_key_values.")]
    actual = [(sizes[1].dim_value, sizes[3].dim_value) for sizes in caches]
    if actual != expected:
        raise UnsupportedError(
            f"the KV cache of this {shape.architecture} is {actual[:1]} heads and width in {len(actual)} tensors, its "
            f"config.json says {expected[:1]} in {len(expected)}; no ONNX export for it"
        )
    if shape.fused_attention and not any(node.op_type == "GroupQueryAttention" for node in graph.node):
        raise UnsupportedError(
            f"this {shape.architecture} is planned with attention in one node per layer, and transformers "
            f"{version('transformers')} computes it another way; no ONNX export for it"
        )


def _take(graph: DecidedGraph, tensor: onnx.TensorProto) -> str:
    """An initializer of the traced graph, with its numbers; returns its new name."""
    array = onnx.numpy_helper.to_array(tensor)
    if array.nbytes > _INLINE_BYTES:
        return graph.initializer(tensor.name, array)
    inline = onnx.TensorProto()
    inline.CopyFrom(tensor)
    inline.ClearField("name")
    return graph.node("Constant", [], f"/constants/{tensor.name}", value=inline)
