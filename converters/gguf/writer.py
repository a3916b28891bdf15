"""GGUF version 3, written as a stream whose size is known before the first byte.

Own code instead of gguf-py's ``GGUFWriter``: the planner asks for exact sizes many times, and the very bytes that are
counted are the ones written. A test compares them with gguf-py's. Layout (ggml's docs/gguf.md): magic, version,
tensor count, key count; keys; tensor infos; padding; tensor data, each padded to the alignment. Little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from acip_export.units import ceil_div
from acip_export.weight_types import weight_type
from converters.gguf.types import TYPE_IDS

ALIGNMENT = 32
_MAGIC = b"GGUF"
_VERSION = 3
_INT8, _UINT16, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 1, 2, 4, 5, 6, 7, 8, 9

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Value:
    """One metadata value, encoded: its type tag followed by its data."""

    encoded: bytes


Metadata = Mapping[str, Value]


def uint16(value: int) -> Value:
    return Value(struct.pack("<IH", _UINT16, value))


def int32(value: int) -> Value:
    return Value(struct.pack("<Ii", _INT32, value))


def uint32(value: int) -> Value:
    return Value(struct.pack("<II", _UINT32, value))


def float32(value: float) -> Value:
    return Value(struct.pack("<If", _FLOAT32, value))


def boolean(value: bool) -> Value:
    return Value(struct.pack("<I?", _BOOL, value))


def string(value: str) -> Value:
    return Value(struct.pack("<I", _STRING) + _string(value))


def strings(values: Sequence[str]) -> Value:
    return Value(struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(map(_string, values)))


def int32s(values: Sequence[int]) -> Value:
    return Value(struct.pack("<IIQ", _ARRAY, _INT32, len(values)) + np.asarray(values, "<i4").tobytes())


def booleans(values: Sequence[bool]) -> Value:
    return Value(struct.pack("<IIQ", _ARRAY, _BOOL, len(values)) + bytes(values))


def float32s(values: Sequence[float]) -> Value:
    return Value(struct.pack("<IIQ", _ARRAY, _FLOAT32, len(values)) + np.asarray(values, "<f4").tobytes())


def int8s(values: bytes) -> Value:
    return Value(struct.pack("<IIQ", _ARRAY, _INT8, len(values)) + values)


def _string(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a GGUF file.

    Attributes:
        name: GGUF name. shape: rows first, as in PyTorch. format: a name of :mod:`acip_export.weight_types`.
    """

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Exact bytes of the data, without padding. Raises ValueError for rows that do not fit the format."""
        return weight_type("gguf", self.type).nbytes(prod(self.shape[:-1]), self.shape[-1])


def padded(count: int) -> int:
    return ceil_div(count, ALIGNMENT) * ALIGNMENT


def offsets(tensors: Sequence[TensorSpec]) -> list[int]:
    """Where each tensor starts, counted from the start of the data."""
    found, position = [], 0
    for tensor in tensors:
        found.append(position)
        position += padded(tensor.nbytes)
    return found


def encode_info(tensor: TensorSpec, offset: int) -> bytes:
    """A tensor's entry in the head. Its length does not depend on ``offset``."""
    extents = tuple(reversed(tensor.shape))
    kind = struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, TYPE_IDS[tensor.type], offset)
    return _string(tensor.name) + kind


def encode_keys(metadata: Metadata, tensor_count: int) -> bytes:
    """The head up to its first tensor. Its length does not depend on ``tensor_count``."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, tensor_count, len(metadata))]
    for key, value in metadata.items():
        parts += (_string(key), value.encoded)
    return b"".join(parts)


def encode_head(metadata: Metadata, tensors: Sequence[TensorSpec]) -> bytes:
    """Everything before the tensor data, padding included."""
    infos = (encode_info(tensor, offset) for tensor, offset in zip(tensors, offsets(tensors), strict=True))
    head = b"".join((encode_keys(metadata, len(tensors)), *infos))
    return head.ljust(padded(len(head)), b"\0")


def file_bytes(metadata: Metadata, tensors: Sequence[TensorSpec]) -> int:
    """Exact size of the file that :class:`GgufWriter` makes of these."""
    return len(encode_head(metadata, tensors)) + sum(padded(tensor.nbytes) for tensor in tensors)


class GgufWriter:
    """Writes one file; tensors are handed over one by one, in the order of ``tensors``.

    A context manager: on an exception the half-written file stays for the caller's temporary directory to remove.

    Raises:
        ValueError: a tensor out of order or of the wrong size, or, at the end, one that is missing.
    """

    def __init__(self, file: Path, metadata: Metadata, tensors: Sequence[TensorSpec]) -> None:
        self._file = file
        self._waiting = list(reversed(tensors))
        self._expected = file_bytes(metadata, tensors)
        self._stream = file.open("wb")
        self._stream.write(encode_head(metadata, tensors))

    def write(self, name: str, data: Bytes) -> None:
        tensor = self._waiting.pop()
        if tensor.name != name or data.nbytes != tensor.nbytes:
            raise ValueError(f"{name} of {data.nbytes:,} bytes given, {tensor.name} of {tensor.nbytes:,} expected")
        self._stream.write(np.ascontiguousarray(data).data)
        self._stream.write(bytes(padded(tensor.nbytes) - tensor.nbytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is not None:
            return
        written = self._file.stat().st_size
        if self._waiting or written != self._expected:
            missing = [tensor.name for tensor in reversed(self._waiting)]
            told = f"{written:,} bytes written, {self._expected:,} expected"
            raise ValueError(f"{self._file}: {told}; missing {missing[:3]}")
