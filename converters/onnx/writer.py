"""The graph's two files: the protobuf, and the numbers beside it, densely packed in the graph's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import onnx

from acip_export.progress import Progress, ProgressCallback
from acip_export.version import __version__
from converters.onnx.graph.decided import Content
from converters.onnx.matrices import ChunkReader, MatrixPart, Vector


@dataclass(frozen=True)
class Packed:
    """A graph whose initializers have their places in the data file.

    Attributes:
        protobuf: bytes of the ``.onnx`` file. data_bytes: size of the data file.
    """

    protobuf: bytes
    data_bytes: int


def pack(model: onnx.ModelProto, location: str) -> Packed:
    """Give every initializer its offset in the file ``location`` beside the graph, and serialize the graph.

    onnxruntime needs no alignment of external data, so there is no padding and the sizes are sums.
    """
    offset = 0
    for tensor in model.graph.initializer:
        nbytes = prod(tensor.dims) * _item_bytes(tensor.data_type)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(nbytes))):
            tensor.external_data.add(key=key, value=value)
        offset += nbytes
    model.producer_name, model.producer_version = "acip-export", __version__
    return Packed(model.SerializeToString(deterministic=True), offset)


@cache
def _item_bytes(kind: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def write_data(
    file: Path, nbytes: int, contents: Mapping[str, Content], reader: ChunkReader, progress: ProgressCallback
) -> None:
    """Stream the initializers, ``nbytes`` together, into ``file``; progress is told after each one."""
    with file.open("wb") as stream:
        for name, content in contents.items():
            for chunk in reader.chunks(content) if isinstance(content, MatrixPart | Vector) else (content,):
                stream.write(np.ascontiguousarray(chunk).data)
            progress(Progress("convert", stream.tell(), nbytes, name))
