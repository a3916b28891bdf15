"""Graphs for neural processors: a cache of fixed length, standard operators around MatMulNBits, no fused attention.

The model builder's graph is rewritten. Qualcomm's backend provider (onnxruntime-qnn) takes MatMulNBits and
SimplifiedLayerNormalization, but neither GroupQueryAttention, contributed RotaryEmbedding nor the norm that adds
first, and only shapes that are known. So these become Add, Gather, MatMul, Where and Softmax, and the cache has as
many slots as the context: a step writes its keys and values into the slots of its positions, keeps those before, and
zeroes those after, which no query looks at. The only free dimension is ``sequence_length``; a session fixes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from acip_export.errors import UnsupportedError

_SEQUENCE = "sequence_length"
# Far below any score, and finite in float16.
_MASKED = -1e4


def with_static_cache(model: ir.Model, context: int) -> None:
    """Rewrite a decoder graph of :func:`converters.onnx.genai_builder.builder.build_graph` in place.

    Raises:
        UnsupportedError: attention or rotary settings that have no rewriting: soft caps, rotation of half a head.
    """
    _Rewriter(model.graph, context).run()


class _Rewriter:
    def __init__(self, graph: ir.Graph, context: int) -> None:
        self._graph = graph
        self._context = context
        self._inputs = {value.name: value for value in graph.inputs}
        self._before: ir.Node | None = None
        self._made: dict[str, ir.Value] = {}
        self._heads: dict[ir.Value | None, tuple[int, int]] = {}
        cache = next(value for name, value in self._inputs.items() if str(name).startswith("past_key_values."))
        assert cache.dtype is not None
        self._dtype = cache.dtype

    def run(self) -> None:
        nodes = list(self._graph)
        self._fix_shapes()
        for node in nodes:
            if node.op_type == "GroupQueryAttention":
                heads, kv_heads = int(_attribute(node, "num_heads")), int(_attribute(node, "kv_num_heads"))
                size = self._head_size(node)
                self._heads |= {node.inputs[0]: (heads, size), node.inputs[1]: (kv_heads, size)}
        for node in nodes:
            self._before = node
            rewrite = {
                "SkipSimplifiedLayerNormalization": self._norm,
                "RotaryEmbedding": self._rotary,
                "GroupQueryAttention": self._attention,
                "FusedMatMul": self._tied_head,
            }.get(node.op_type)
            if rewrite is not None:
                rewrite(node)
        self._remove_unused()

    def _head_size(self, attention: ir.Node) -> int:
        shape = _present(attention.inputs[3]).shape
        assert shape is not None
        return int(shape[3])

    def _fix_shapes(self) -> None:
        for value in (*self._graph.inputs, *self._graph.outputs):
            dims: list[Any] = list(value.shape or ())
            cached = len(dims) == 4
            value.shape = ir.Shape([1, dims[1], self._context, dims[3]] if cached else [1, *dims[1:]])
        # Whoever counts tokens with it may go on doing so; the graph goes by positions alone.
        self._inputs["attention_mask"].shape = ir.Shape([1, "total_sequence_length"])

    def _node(self, op: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        output = ir.Value(name=f"{name}/output_0")
        made = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        assert self._before is not None
        self._graph.insert_before(self._before, ir.Node("", op, inputs, made, outputs=[output], name=name))
        return output

    def _constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        name = f"/model/constants/{array.dtype}/{array.shape}/{array.reshape(-1)[:4].tolist()}"
        if name not in self._made:
            self._made[name] = self._node("Constant", (), name, value=ir.tensor(array))
        return self._made[name]

    def _integers(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _number(self, value: float) -> ir.Value:
        return self._constant(np.array(value, self._dtype.numpy()))

    def _shared(self, op: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """A node that all layers use."""
        name = f"/model/static_cache/{name}"
        if name not in self._made:
            self._made[name] = self._node(op, inputs, name, **attributes)
        return self._made[name]

    def _replace(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        for old, new in zip(node.outputs, values, strict=False):
            if new is None:
                continue
            if old in self._heads:
                self._heads[new] = self._heads[old]
            if old in self._graph.outputs:
                index = list(self._graph.outputs).index(old)
                name, new.type, new.shape = old.name, old.type, old.shape
                self._graph.outputs[index] = new
                old.name, new.name = f"{name}/replaced", name
            old.replace_all_uses_with(new)
        self._graph.remove(node, safe=True)

    def _norm(self, node: ir.Node) -> None:
        left, right, scale = (_present(value) for value in node.inputs[:3])
        name = str(node.name)
        total = self._node("Add", (left, right), f"{name}/Add")
        settings = {"epsilon": float(_attribute(node, "epsilon")), "axis": -1, "stash_type": 1}
        normed = self._node("SimplifiedLayerNormalization", (total, scale), f"{name}/SimplifiedLayerNorm", **settings)
        self._replace(node, (normed, None, None, total))

    def _split_heads(self, value: ir.Value, heads: int, size: int, name: str) -> ir.Value:
        """(1, tokens, heads * size) to (1, heads, tokens, size)."""
        apart = self._node("Reshape", (value, self._integers(1, -1, heads, size)), f"{name}/Heads")
        return self._node("Transpose", (apart,), f"{name}/Transpose", perm=[0, 2, 1, 3])

    def _rotary(self, node: ir.Node) -> None:
        if int(_attribute(node, "rotary_embedding_dim")) or int(_attribute(node, "interleaved")):
            raise UnsupportedError("rotary embedding of a part of each head has no graph for --backend qnn-friendly")
        source, _, cosines, sines = (_present(value) for value in node.inputs[:4])
        name = str(node.name)
        heads, size = self._heads[node.outputs[0]]
        x = self._split_heads(source, heads, size, name)
        tables = [self._at_positions(table) for table in (cosines, sines)]
        first = self._node("Slice", (x, *(self._integers(v) for v in (0, size // 2, 3))), f"{name}/First")
        second = self._node("Slice", (x, *(self._integers(v) for v in (size // 2, size, 3))), f"{name}/Second")
        halves = []
        for label, op, a, b in (("Left", "Sub", first, second), ("Right", "Add", second, first)):
            kept = self._node("Mul", (a, tables[0]), f"{name}/{label}/Mul")
            turned = self._node("Mul", (b, tables[1]), f"{name}/{label}/Mul_1")
            halves.append(self._node(op, (kept, turned), f"{name}/{label}/{op}"))
        # Attention goes on with the heads apart.
        self._replace(node, (self._node("Concat", halves, f"{name}/Concat", axis=-1),))

    def _at_positions(self, table: ir.Value) -> ir.Value:
        """Rows of a rotary table, (1, 1, tokens, size / 2)."""
        rows = self._shared("Gather", (table, self._inputs["position_ids"]), f"{table.name}/Gather")
        return self._shared("Unsqueeze", (rows, self._integers(1)), f"{table.name}/Unsqueeze")

    def _positions(self) -> tuple[ir.Value, ir.Value]:
        """Positions of the tokens as (1, 1, tokens, 1) and (1, 1, 1, tokens)."""
        ids = self._inputs["position_ids"]
        column = self._shared("Reshape", (ids, self._integers(1, 1, -1, 1)), "Positions")
        return column, self._shared("Reshape", (ids, self._integers(1, 1, 1, -1)), "Positions_1")

    def _cached(self, past: ir.Value, new: ir.Value, name: str) -> ir.Value:
        """The cache (1, heads, context, size) with the new rows in the slots of their positions."""
        _, across = self._positions()
        slots = self._constant(np.arange(self._context, dtype=np.int64).reshape(1, 1, -1, 1))
        ours = self._shared("Equal", (slots, across), "Ours")
        spread = self._shared("Cast", (ours,), "Ours/Cast", to=int(self._dtype))
        start = self._shared("Slice", (across, *(self._integers(v) for v in (0, 1, 3))), "Start")
        earlier = self._shared("Less", (slots, start), "Earlier")
        kept = self._node("Where", (earlier, past, self._number(0.0)), f"{name}/Kept")
        placed = self._node("MatMul", (spread, new), f"{name}/Placed")
        return self._node("Add", (kept, placed), f"{name}/Add")

    def _mask(self, window: int) -> ir.Value:
        """(1, 1, tokens, context): 0 where a token may look, else far below."""
        down, _ = self._positions()
        slots = self._constant(np.arange(self._context, dtype=np.int64).reshape(1, 1, 1, -1))
        seen = self._shared("LessOrEqual", (slots, down), "Seen")
        if window >= 0:
            first = self._shared("Sub", (down, self._integers(window)), f"First_{window}")
            inside = self._shared("Greater", (slots, first), f"Inside_{window}")
            seen = self._shared("And", (seen, inside), f"Seen_{window}")
        return self._shared("Where", (seen, self._number(0.0), self._number(_MASKED)), f"Mask_{window}")

    def _attention(self, node: ir.Node) -> None:
        if float(_attribute(node, "softcap")):
            raise UnsupportedError("attention with a soft cap has no graph for --backend qnn-friendly")
        name = str(node.name)
        query, key, value, past_key, past_value = (_present(given) for given in node.inputs[:5])
        heads, size = int(_attribute(node, "num_heads")), self._head_size(node)
        kv_heads = int(_attribute(node, "kv_num_heads"))
        value = self._split_heads(value, kv_heads, size, f"{name}/Value")
        keys = self._cached(past_key, key, f"{name}/Key")
        values = self._cached(past_value, value, f"{name}/Cache")
        # The queries of a group of heads are rows of one product with the group's keys.
        grouped = self._node("Reshape", (query, self._integers(1, kv_heads, -1, size)), f"{name}/Group")
        across = self._node("Transpose", (keys,), f"{name}/Keys", perm=[0, 1, 3, 2])
        scores = self._node("MatMul", (grouped, across), f"{name}/Scores")
        scaled = self._node("Mul", (scores, self._number(float(_attribute(node, "scale")))), f"{name}/Scale")
        apart = self._node("Reshape", (scaled, self._integers(1, heads, -1, self._context)), f"{name}/Ungroup")
        masked = self._node("Add", (apart, self._mask(int(_attribute(node, "local_window_size")))), f"{name}/Mask")
        shares = self._node("Softmax", (masked,), f"{name}/Softmax", axis=-1)
        together = self._node("Reshape", (shares, self._integers(1, kv_heads, -1, self._context)), f"{name}/Group_1")
        mixed = self._node("MatMul", (together, values), f"{name}/Mix")
        split = self._node("Reshape", (mixed, self._integers(1, heads, -1, size)), f"{name}/Ungroup_1")
        back = self._node("Transpose", (split,), f"{name}/Tokens", perm=[0, 2, 1, 3])
        joined = self._node("Reshape", (back, self._integers(1, -1, heads * size)), f"{name}/Join")
        self._replace(node, (joined, keys, values))

    def _tied_head(self, node: ir.Node) -> None:
        source, weight = (_present(given) for given in node.inputs[:2])
        turned = self._node("Transpose", (weight,), f"{node.name}/Transpose", perm=[1, 0])
        self._replace(node, (self._node("MatMul", (source, turned), f"{node.name}/MatMul"),))

    def _remove_unused(self) -> None:
        """Nodes that nothing asks for any more: lengths for the fused attention."""
        for node in reversed(list(self._graph)):
            if all(not value.uses() and value not in self._graph.outputs for value in node.outputs):
                self._graph.remove(node, safe=True)


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value
