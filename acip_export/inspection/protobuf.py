"""Protocol buffers, as far as one walks over them: the fields of a message, within bounds (protobuf.dev/encoding)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

from acip_export.errors import ModelFileError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number: field number. wire: wire type.
        begin, end: where its bytes lie in the file; of a varint they are empty and ``value`` holds it.
    """

    number: int
    wire: int
    begin: int
    end: int
    value: int = 0


class Message:
    """``data[begin:end]``, read as a message. ``where`` names the file in errors."""

    def __init__(self, data: mmap | bytes, where: str, begin: int, end: int) -> None:
        self._data, self._where, self._begin, self._end = data, where, begin, end

    def inner(self, field: Field) -> Message:
        """The message that a field holds."""
        return Message(self._data, self._where, field.begin, field.end)

    def raw(self, field: Field) -> bytes:
        return self._data[field.begin : field.end]

    def text(self, field: Field) -> str:
        return self.raw(field).decode("utf-8", "replace")

    def integers(self, field: Field) -> list[int]:
        """A repeated integer's values, packed or not."""
        if field.wire == VARINT:
            return [field.value]
        values, position = [], field.begin
        while position < field.end:
            value, position = self._varint(position, field.end)
            values.append(value)
        return values

    def strings(self) -> dict[int, str]:
        """Field number to text, for a message of strings such as a key with its value."""
        return {field.number: self.text(field) for field in self.fields() if field.wire == BYTES}

    def fields(self) -> Iterator[Field]:
        """Raises ModelFileError where the bytes are no message, or end too early."""
        position = self._begin
        while position < self._end:
            tag, position = self._varint(position, self._end)
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                value, position = self._varint(position, self._end)
                yield Field(number, wire, position, position, value)
                continue
            if wire == BYTES:
                length, position = self._varint(position, self._end)
            elif wire in (FIXED32, FIXED64):
                length = 4 if wire == FIXED32 else 8
            else:
                raise self._damage(f"unknown wire type {wire} at byte {position}")
            if number == 0 or length > self._end - position:
                raise self._damage(f"{length:,} bytes expected at {position:,}, {self._end - position:,} are there")
            yield Field(number, wire, position, position + length)
            position += length

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for index, byte in enumerate(self._data[position : min(end, position + _LONGEST_VARINT)]):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, position + index + 1
        raise self._damage(f"a number breaks off at byte {position}")

    def _damage(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._where} is truncated or no ONNX file: {what}; copy or download it again")
