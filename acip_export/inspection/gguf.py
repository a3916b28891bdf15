"""The head of a GGUF file, read in microseconds without numpy: only names, shapes, types and offsets.

Own code instead of gguf-py's reader, which takes most of a second to import and makes an object of every token.
Layout: ggml's docs/gguf.md. Every count and length is checked against the file's size before it is believed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from acip_export.errors import ModelFileError
from acip_export.inspection.anatomy import checked_name, fact
from acip_export.inspection.mapped_file import map_file
from acip_export.units import ceil_div

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MOST_DIMENSIONS = 4
# Far beyond any model; each takes time.
_MOST_TENSORS = 100_000
_DEEPEST_ARRAY = 8
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8

# enum ggml_type: id -> (name, weights a block, bytes a block). A test compares with gguf-py and with our own table.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
    42: ("q2_0", 64, 18),
}


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class PlacedTensor:
    """Shape rows first; ``type_name`` as in :data:`GGML_TYPES`; ``begin`` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GgufHead:
    """Everything before the tensors' data.

    Attributes:
        values: metadata, of arrays their length only. encoded: the same as in the file, type tag first.
    """

    version: int
    values: Mapping[str, object]
    encoded: Mapping[str, bytes]
    tensors: tuple[PlacedTensor, ...]


def read_head(file: Path) -> GgufHead:
    """Raises ModelFileError: damaged, truncated, hostile, or of a version that is not 2 or 3."""
    with map_file(file) as data:
        return _parse(data, file)


def _parse(data: mmap.mmap, file: Path) -> GgufHead:
    head = _Head(data, str(file))
    if head.take(4) != MAGIC:
        raise ModelFileError(f"{file} is no GGUF file: it starts with {data[:4]!r}, expected {MAGIC!r}")
    version = head.number("<I")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0
        found = "big-endian" if swapped else f"version {version}"
        raise ModelFileError(f"{file} is a GGUF file of {found}, this tool reads little-endian versions 2 and 3")
    tensor_count, key_count = head.number("<Q"), head.number("<Q")
    head.expect(tensor_count, _SMALLEST_TENSOR, "tensors")
    head.expect(key_count, _SMALLEST_KEY, "keys")
    if max(tensor_count, key_count) > _MOST_TENSORS:
        raise ModelFileError(f"{file} is damaged: it has more than {_MOST_TENSORS:,} tensors or keys")
    metadata: dict[str, object] = {}
    encoded: dict[str, bytes] = {}
    for _ in range(key_count):
        key = checked_name(head.string(), str(file))
        begin = head.position
        metadata[key] = head.value(head.number("<I"))
        encoded[key] = data[begin : head.position]
    infos = [_tensor_info(head, file) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ModelFileError(f"{file} is damaged: general.alignment is {alignment!r}, expected a power of two")
    start = ceil_div(head.position, alignment) * alignment
    return GgufHead(version, metadata, encoded, _place(infos, start, alignment, len(data), file))


class _Head:
    """A position in the file that moves forward, and refuses to leave it."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self._data = data
        self._size = len(data)
        self._where = where
        self.position = 0

    def _advance(self, count: int) -> int:
        begin = self.position
        if count > self._size - begin:
            raise ModelFileError(
                f"{self._where} is truncated or damaged: {count:,} bytes expected at {begin:,}, the file ends at "
                f"{self._size:,}; copy or download it again"
            )
        self.position = begin + count
        return begin

    def take(self, count: int) -> bytes:
        begin = self._advance(count)
        return self._data[begin : begin + count]

    def scalar(self, code: str) -> object:
        value: object = struct.unpack_from(code, self._data, self._advance(struct.calcsize(code)))[0]
        return value

    def number(self, code: str) -> int:
        value = self.scalar(code)
        assert isinstance(value, int)
        return value

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def expect(self, count: int, smallest: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold, before looping over it."""
        if count * smallest > self._size - self.position:
            raise ModelFileError(
                f"{self._where} is truncated or damaged: it declares {count:,} {what}, and has {self._size:,} bytes"
            )

    def value(self, tag: int, depth: int = 0) -> object:
        """A metadata value; of an array only its length is kept."""
        if tag == _STRING:
            return self.string().decode("utf-8", "replace")
        if tag == _ARRAY:
            return self._array(depth)
        if tag not in _SCALARS:
            raise ModelFileError(f"{self._where} is damaged: unknown metadata type {tag}")
        return self.scalar(_SCALARS[tag])

    def _array(self, depth: int) -> _Length:
        tag, count = self.number("<I"), self.number("<Q")
        if tag in _SCALARS:
            self._advance(count * struct.calcsize(_SCALARS[tag]))
        elif tag == _STRING:
            self._skip_strings(count)
        elif tag == _ARRAY and depth < _DEEPEST_ARRAY:
            self.expect(count, 12, "arrays")
            for _ in range(count):
                self._array(depth + 1)
        else:
            raise ModelFileError(f"{self._where} is damaged: unknown array type {tag}")
        return _Length(count)

    def _skip_strings(self, count: int) -> None:
        # Vocabularies have hundreds of thousands of entries: this loop is most of the time of reading a head.
        self.expect(count, 8, "strings")
        data, position, last = self._data, self.position, self._size - 8
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > last:
                position = self._size + 1
                break
            position += 8 + length_at(data, position)[0]
        self._advance(position - self.position)


class _Length(int):
    """Length of a metadata array."""


def _tensor_info(head: _Head, file: Path) -> _Info:
    name = checked_name(head.string(), str(file))
    dimensions = head.number("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ModelFileError(f"{file} is damaged: tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([head.number("<Q") for _ in range(dimensions)]))
    return _Info(name, shape, head.number("<I"), head.number("<Q"))


def _place(infos: list[_Info], start: int, alignment: int, size: int, file: Path) -> tuple[PlacedTensor, ...]:
    """Check that every tensor lies in the file, apart from the others."""
    sizes: dict[str, int] = {}
    in_order = sorted(infos, key=lambda info: info.offset)
    for place, info in enumerate(in_order, 1):
        limit = start + in_order[place].offset if place < len(in_order) else size
        known = GGML_TYPES.get(info.type_id)
        begin = start + info.offset
        if known is None:  # a type newer than this table takes what lies before the next tensor
            nbytes = limit - begin
        else:
            row = info.shape[-1] if info.shape else 1
            if row % known[1]:
                raise ModelFileError(
                    f"{file} is damaged: {info.name!r} has rows of {row}, no multiple of {known[1]} ({known[0]})"
                )
            nbytes = prod(info.shape) // known[1] * known[2]
        if info.offset % alignment or begin + nbytes > size or nbytes < 0:
            raise ModelFileError(
                f"{file} is truncated or damaged: tensor {info.name!r} takes {nbytes:,} bytes at {begin:,}, the file "
                f"has {size:,}; copy or download it again"
            )
        if begin + nbytes > limit:
            raise ModelFileError(f"{file} is damaged: tensor {info.name!r} overlaps the next")
        if info.name in sizes:
            raise ModelFileError(f"{file} is damaged: two tensors are called {info.name!r}")
        sizes[info.name] = nbytes
    return tuple(
        PlacedTensor(info.name, info.shape, _type_name(info.type_id), start + info.offset, sizes[info.name])
        for info in infos
    )


def _type_name(type_id: int) -> str:
    return GGML_TYPES[type_id][0] if type_id in GGML_TYPES else f"type {type_id}"


def facts_of(head: GgufHead) -> dict[str, str]:
    """Scalars of the model's general keys and hyper-parameters; of arrays their length."""
    metadata = head.values
    architecture = str(metadata.get("general.architecture", ""))
    wanted = ("general.", "acip.", "adapter.", f"{architecture}.", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    facts = {"gguf version": str(head.version)}
    for key, value in metadata.items():
        if key == "tokenizer.ggml.tokens":
            facts["vocabulary"] = str(value)
        elif key.startswith(wanted):
            facts[key] = f"{value} values" if isinstance(value, _Length) else fact(value)
    return facts
