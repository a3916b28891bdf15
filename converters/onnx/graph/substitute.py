"""The graph that is written: a marked graph with the plan's nodes in place of its marks."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import NodeProto

from acip_export.errors import UnsupportedError
from acip_export.model.tensor_names import HEAD
from converters.onnx.graph.decided import EMBEDDING, LINEAR, MARKS, DecidedGraph


def substitute(
    marked: onnx.ModelProto,
    graph: DecidedGraph,
    tied: bool,
    renamed: dict[str, str],
    keep: Callable[[onnx.TensorProto], None] | None = None,
) -> onnx.ModelProto:
    """Walk a marked graph and append its nodes, and the plan's for its marks, to ``graph``.

    Args:
        tied: the head has no matrix of its own.
        renamed: values of the marked graph that go by another name already.
        keep: called with every other initializer of the marked graph when the first node reads it.

    Returns:
        The whole model: header, inputs and outputs are the marked graph's.

    Raises:
        UnsupportedError: a decision has no place in the graph, or the graph asks for one that is not there.
    """
    embedding = _embedding_of(marked.graph) if tied else None
    if tied:
        graph.unused.discard(HEAD)
    outputs = {value.name for value in marked.graph.output}
    described = {value.name: value for value in marked.graph.value_info}
    waiting = {tensor.name: tensor for tensor in marked.graph.initializer}
    renamed = dict(renamed)
    for node in marked.graph.node:
        if node.domain == MARKS:
            (name,) = node.output
            output = name if name in outputs else None
            renamed[name] = _unmarked(graph, node, renamed, embedding, output, described.get(name))
            continue
        if node.op_type == "Constant":
            if node.output[0] in graph.constants:
                continue
            graph.constants.add(node.output[0])
        for name in node.input:
            if keep is not None and name in waiting:
                keep(waiting.pop(name))
        graph.nodes.append(_renamed(node, renamed))
        graph.described.extend(described[name] for name in node.output if name in described)
    if graph.unused:
        raise UnsupportedError(f"ONNX has no place for {min(graph.unused)} in this model; the config says otherwise")
    model = onnx.ModelProto(ir_version=marked.ir_version, opset_import=marked.opset_import)
    model.graph.name = marked.graph.name
    model.graph.metadata_props.extend(marked.graph.metadata_props)
    model.graph.input.extend(marked.graph.input)
    model.graph.output.extend(marked.graph.output)
    graph.write(model.graph)
    return model


def _unmarked(
    graph: DecidedGraph,
    node: NodeProto,
    renamed: dict[str, str],
    embedding: str | None,
    output: str | None,
    like: onnx.ValueInfoProto | None,
) -> str:
    tensor = node.attribute[0].s.decode()
    inputs = [renamed.get(name, name) for name in node.input]
    stem = graph.stem(node, tensor)
    if node.op_type == EMBEDDING:
        return graph.lookup(tensor, inputs[0], stem, like)
    if node.op_type == LINEAR:
        if embedding is not None and tensor == HEAD:
            return graph.head(embedding, inputs[0], f"{stem}/MatMul", output, like)
        return graph.chain(tensor, inputs[0], stem, output, like)
    return graph.vector(tensor)


def _renamed(node: NodeProto, renamed: dict[str, str]) -> NodeProto:
    """The node, or a copy that reads what has taken the place of marks."""
    if not (any(name in renamed for name in node.input) or any(a.HasField("g") for a in node.attribute)):
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [renamed.get(name, name) for name in node.input]
    for attribute in copy.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            inner.CopyFrom(_renamed(inner, renamed))
    return copy


def _embedding_of(graph: onnx.GraphProto) -> str:
    """The tensor of the first embedding that reads the tokens."""
    producers = {output: node for node in graph.node for output in node.output}
    ids = graph.input[0].name
    for node in graph.node:
        if node.domain == MARKS and node.op_type == EMBEDDING and _reads(node.input[0], ids, producers):
            return str(node.attribute[0].s.decode())
    raise UnsupportedError("the head is tied to an embedding, and no embedding reads the tokens")


def _reads(value: str, wanted: str, producers: dict[str, NodeProto]) -> bool:
    """Through the views that models make of their tokens."""
    while value != wanted and value in producers and producers[value].input:
        value = producers[value].input[0]
    return value == wanted
