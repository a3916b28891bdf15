"""The weights of an ONNX file, found by walking its protobuf: no onnx package, no numbers read.

Importing ``onnx`` and parsing would cost most of a second and as much memory as the file has inlined. Field numbers:
onnx/onnx.proto. External data is checked against the sizes of the files that it names, which must lie beside the model.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from math import prod
from mmap import mmap
from pathlib import Path, PurePosixPath

from acip_export.errors import ModelFileError
from acip_export.inspection.anatomy import TensorPart, checked_name, fact
from acip_export.inspection.mapped_file import map_file
from acip_export.inspection.protobuf import BYTES, VARINT, Message
from acip_export.units import ceil_div

_DEEPEST_GRAPH = 16
# Far beyond any model: each takes time, and a file of a megabyte can declare as many.
_MOST_DIMENSIONS, _MOST_TENSORS = 64, 100_000

# TensorProto.DataType: id -> (name, bits); 0 bits: no fixed size.
ONNX_TYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
    24: ("float8e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}


def read_onnx(file: Path, name: str) -> tuple[tuple[TensorPart, ...], dict[str, str], dict[str, int]]:
    """Tensors, facts, and the bytes of every external data file, by path below the anatomy's root.

    ``name`` is the model file's own path below that root.

    Raises:
        ModelFileError: damaged, truncated or hostile; external data that is missing, too short or elsewhere.
    """
    with map_file(file) as data:
        return _Walk(data, file, name).read()


class _Walk:
    """One pass over a model. ``_regions``: external bytes counted so far, ``(file, offset) -> bytes``."""

    def __init__(self, data: mmap, file: Path, name: str) -> None:
        self._model = Message(data, str(file), 0, len(data))
        self._file = file
        self._name = name
        self._tensors: list[TensorPart] = []
        self._external_files: dict[str, int] = {}
        self._regions: dict[tuple[str, int], int] = {}
        self._uses: dict[str, int] = {}

    def read(self) -> tuple[tuple[TensorPart, ...], dict[str, str], dict[str, int]]:
        facts: dict[str, str] = {}
        found = set()
        for field in self._model.fields():
            found.add(field.number)
            if field.number == 1 and field.wire == VARINT:
                facts["ir version"] = str(field.value)
            elif field.wire != BYTES:
                continue
            elif field.number in (2, 3):
                facts["producer" if field.number == 2 else "producer version"] = fact(self._model.text(field))
            elif field.number == 7:
                self._graph(self._model.inner(field), 0)
            elif field.number == 8:
                opset = {f.number: f for f in self._model.inner(field).fields()}
                domain = self._model.text(opset[1]) if 1 in opset else ""
                facts[f"opset {fact(domain or 'ai.onnx')}"] = str(opset[2].value if 2 in opset else 0)
            elif field.number == 14:
                entry = self._model.inner(field).strings()
                facts[fact(entry.get(1, ""))] = fact(entry.get(2, ""))
            elif field.number == 25:
                self._nodes(self._model.inner(field), 7, 0)
        # The operator sets come after the graph: without them the end is missing.
        for number, what in ((7, "graph"), (8, "operator set")):
            if number not in found:
                raise ModelFileError(f"{self._file} is truncated or no ONNX file: it has no {what}")
        self._refuse_overlaps()
        return tuple(self._tensors), facts, self._external_files

    def _graph(self, graph: Message, depth: int) -> None:
        if depth > _DEEPEST_GRAPH:
            raise ModelFileError(f"{self._file} is damaged: its graphs are nested deeper than {_DEEPEST_GRAPH}")
        for field in graph.fields():
            if field.number == 5 and field.wire == BYTES:
                self._tensor(graph.inner(field), "")
            elif field.number == 15 and field.wire == BYTES:  # sparse: values and indices are tensors of their own
                sparse = graph.inner(field)
                for part in sparse.fields():
                    if part.number in (1, 2) and part.wire == BYTES:
                        self._tensor(sparse.inner(part), "sparse")
        self._nodes(graph, 1, depth)

    def _nodes(self, owner: Message, number: int, depth: int) -> None:
        """Tensors in the attributes of nodes (constants), and graphs in them (branches and loops)."""
        for field in owner.fields():
            if field.number != number or field.wire != BYTES:
                continue
            node = owner.inner(field)
            parts = [part for part in node.fields() if part.wire == BYTES]
            output = next((checked_name(node.raw(part), str(self._file)) for part in parts if part.number == 2), "")
            for attribute in (node.inner(part) for part in parts if part.number == 5):
                for value in attribute.fields():
                    if value.number in (5, 10) and value.wire == BYTES:
                        self._tensor(attribute.inner(value), output)
                    elif value.number in (6, 11) and value.wire == BYTES:
                        self._graph(attribute.inner(value), depth + 1)

    def _tensor(self, tensor: Message, fallback: str) -> None:
        shape: list[int] = []
        type_id = listed = 0
        name = fallback or "constant"
        raw: int | None = None
        external: dict[str, str] = {}
        for field in tensor.fields():
            if field.number == 1:
                if field.end - field.begin > 10 * _MOST_DIMENSIONS or len(shape) > _MOST_DIMENSIONS:
                    raise ModelFileError(
                        f"{self._file} is damaged: a tensor has more than {_MOST_DIMENSIONS} dimensions"
                    )
                shape += tensor.integers(field)
            elif field.number == 2:
                type_id = field.value
            elif field.number == 8:
                name = checked_name(tensor.raw(field), str(self._file)) or name
            elif field.number == 9:
                raw = field.end - field.begin
            elif field.number in (4, 5, 6, 7, 10, 11):  # numbers one by one, packed or not
                listed += field.end - field.begin
            elif field.number == 13 and field.wire == BYTES:
                entry = tensor.inner(field).strings()
                external[entry.get(1, "")] = entry.get(2, "")
        name = self._unique(name)
        if len(self._tensors) >= _MOST_TENSORS:
            raise ModelFileError(f"{self._file} is damaged: it has more than {_MOST_TENSORS:,} tensors")
        if any(extent >= 1 << 63 for extent in shape):
            raise ModelFileError(f"{self._file} is damaged: tensor {name!r} has a negative extent")
        type_name, bits = ONNX_TYPES.get(type_id, (f"type {type_id}", 0))
        needed = ceil_div(prod(shape) * bits, 8) if bits else None
        where, nbytes = self._name, listed if raw is None else raw
        if external:
            where, offset, nbytes = self._locate(name, external, needed)
        if needed not in (None, nbytes) and (external or raw is not None):
            raise ModelFileError(
                f"{self._file} is damaged: tensor {name!r} has {nbytes:,} bytes, its shape needs {needed:,}"
            )
        if needed and not nbytes:
            raise ModelFileError(f"{self._file} is damaged: tensor {name!r} has no bytes, its shape needs {needed:,}")
        if external:
            nbytes = self._count_once(name, where, offset, nbytes)
        self._tensors.append(TensorPart(name, tuple(shape), type_name, nbytes, where))

    def _locate(self, name: str, entries: Mapping[str, str], needed: int | None) -> tuple[str, int, int]:
        """File, offset and bytes of external data."""
        location = PurePosixPath(entries.get("location", ""))
        if location.is_absolute() or ".." in location.parts or not location.parts or not str(location).isprintable():
            raise ModelFileError(
                f"{self._file} is hostile or damaged: tensor {name!r} lies in {str(location)!r}, not beside the model"
            )
        path = (PurePosixPath(self._name).parent / location).as_posix()
        if path not in self._external_files:
            self._external_files[path] = self._external_size(location)
        size = self._external_files[path]
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries["length"]) if "length" in entries else size - offset if needed is None else needed
        except ValueError:
            raise ModelFileError(
                f"{self._file} is damaged: tensor {name!r} has an offset or length that is no number"
            ) from None
        if offset < 0 or length < 0 or offset + length > size:
            raise ModelFileError(
                f"{self._file.parent / location} is truncated: tensor {name!r} takes {length:,} bytes at {offset:,}, "
                f"the file has {size:,}; copy or download it again"
            )
        return path, offset, length

    def _external_size(self, location: PurePosixPath) -> int:
        """Of a file beside the model; in a cache of downloads both are links, and what they stand for is together."""
        data = self._file.parent / location
        try:
            real, status = data.resolve(strict=True), data.stat()
        except (OSError, RuntimeError):
            raise ModelFileError(
                f"{self._file} keeps its weights in {location}, which is not beside it; copy that file as well"
            ) from None
        beside = (self._file.parent.resolve(), self._file.resolve().parent)
        if not any(real.is_relative_to(directory) for directory in beside):
            raise ModelFileError(
                f"{self._file} is hostile or damaged: its weights in {location} are a link to {real}, which is not "
                "beside the model"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{data} is no regular file: devices and pipes are not read")
        return status.st_size

    def _count_once(self, name: str, path: str, offset: int, nbytes: int) -> int:
        """Tied weights are two names of the same bytes: the second one counts nothing."""
        known = self._regions.get((path, offset))
        if known is not None and nbytes not in (0, known):
            raise ModelFileError(f"{self._file} is damaged: tensor {name!r} overlaps another")
        if known is None and nbytes:
            self._regions[path, offset] = nbytes
        return nbytes if known is None else 0

    def _refuse_overlaps(self) -> None:
        last_path, last_end = "", 0
        for (path, offset), nbytes in sorted(self._regions.items()):
            if path == last_path and offset < last_end:
                raise ModelFileError(f"{self._file} is damaged: tensors overlap at byte {offset} of {path}")
            last_path, last_end = path, offset + nbytes

    def _unique(self, name: str) -> str:
        """Names are unique in one graph only; a branch may use one again."""
        self._uses[name] = self._uses.get(name, 0) + 1
        return name if self._uses[name] == 1 else f"{name} ({self._uses[name]})"
