"""The graph's two files: the protobuf, and the numbers beside it, densely packed in the graph's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from acip_export.progress import Progress, ProgressCallback
from acip_export.version import __version__
from converters.onnx.matrices import MatrixPart, MatrixReader, Vector

Contents = Mapping[str, MatrixPart | Vector | NDArray[Any]]


@dataclass(frozen=True)
class Packed:
    """A graph whose initializers have their places in the data file.

    Attributes:
        protobuf: bytes of the ``.onnx`` file. data_bytes: size of the data file.
    """

    protobuf: bytes
    data_bytes: int


def pack(graph: ir.Model, contents: Contents, location: str) -> Packed:
    """Give every initializer its offset in the file ``location`` beside the graph, and serialize the graph.

    onnxruntime needs no alignment of external data, so there is no padding and the sizes are sums.
    """
    offset = 0
    for name, value in graph.graph.initializers.items():
        content = contents[name]
        nbytes = prod(content.shape) * content.dtype.itemsize
        value.const_value = ir.ExternalTensor(
            location,
            offset,
            nbytes,
            ir.DataType.from_numpy(content.dtype),
            shape=ir.Shape(content.shape),
            name=name,
        )
        offset += nbytes
    # The builder would write the revision of whatever git repository surrounds it.
    graph.producer_name, graph.producer_version = "acip-export", __version__
    return Packed(ir.serde.serialize_model(graph).SerializeToString(deterministic=True), offset)


def write_data(file: Path, nbytes: int, contents: Contents, reader: MatrixReader, progress: ProgressCallback) -> None:
    """Stream the initializers, ``nbytes`` together, into ``file``; progress is told after each one."""
    with file.open("wb") as stream:
        for name, content in contents.items():
            for chunk in reader.chunks(content) if isinstance(content, MatrixPart | Vector) else (content,):
                stream.write(np.ascontiguousarray(chunk).data)
            progress(Progress("convert", stream.tell(), nbytes, name))
