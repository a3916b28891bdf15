"""A graph whose attention keeps keys and values in 8 or 4 bits, as onnxruntime-genai's model builder writes it.

A number is its code times the scale of its channel. The scales are the graph's last initializers: what is before them
lies where it lies in the graph with a cache in floats, which runs on the same data file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from acip_export.model.shape import ModelShape
from converters.onnx.backends import ROUNDED_CACHES
from converters.onnx.graph.decided import Contents, set_attribute, shaped

ATTENTION = "GroupQueryAttention"
# Inputs of the node, by position.
KEYS, VALUES, PAST_KEYS = 1, 2, 3
_SCALES = 12
_CACHES = ("past_key_values.", "present.")


def round_cache(model: onnx.ModelProto, contents: Contents, cache_type: str, shape: ModelShape) -> None:
    """Change the cache of a finished graph to ``cache_type``, with scales of 1 for every channel of every head."""
    bits = ROUNDED_CACHES[cache_type]
    scales = np.ones(shape.kv_heads * shape.head_dim, np.float32)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(_CACHES):
            tensor = value.type.tensor_type
            # Two numbers of 4 bits share a byte.
            tensor.elem_type = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
            tensor.shape.dim[-1].dim_value = shape.head_dim * bits // 8
    for layer, node in enumerate(attentions(model)):
        node.input.extend([""] * (_SCALES - len(node.input)))
        for side in ("k", "v"):
            name = f"model.layers.{layer}.attn.{side}_scale"
            node.input.append(name)
            set_attribute(node.attribute.add(), f"{side}_quant_type", "PER_CHANNEL")
            model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=scales.shape)
            model.graph.value_info.append(shaped(name, TensorProto.FLOAT, scales.shape))
            contents[name] = scales
        set_attribute(node.attribute.add(), "kv_cache_bit_width", bits)


def attentions(model: onnx.ModelProto) -> Iterator[NodeProto]:
    """Yield the attention nodes, which come in the order of the layers."""
    return (node for node in model.graph.node if node.op_type == ATTENTION)
