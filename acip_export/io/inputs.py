"""The edge: every file that somebody else may have written is opened, and every document decoded, here.

Behind it there are regular files of a bounded size, and objects of a declared type. JSON goes straight from bytes into
the type (msgspec), so that no integer of 5,000 digits, ``NaN``, lone surrogate or hundred thousand brackets is ever a
Python object.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec
from msgspec import Meta

from acip_export.errors import AcipError

LARGEST_DOCUMENT = 64_000_000

_LARGEST = 2**63 - 1
_LARGEST_FLOAT = 1.7976931348623157e308

# The numbers of all schemas. TOML has infinities and NaN; JSON has numbers that round to infinity.
Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
Positive = Annotated[int, Meta(ge=1, le=_LARGEST)]
Finite = Annotated[float, Meta(ge=-_LARGEST_FLOAT, le=_LARGEST_FLOAT)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST_FLOAT)]
PositiveFloat = Annotated[float, Meta(gt=0, le=_LARGEST_FLOAT)]
Share = Annotated[float, Meta(ge=0, le=1)]

# Makes the error of a message: a class of acip_export/errors.py, or a function that adds what to do about it.
Failure = Callable[[str], AcipError]

_T = TypeVar("_T")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
_PLACE = re.compile(r"(?P<problem>.*) - at `(?:key` in `)?(?P<place>.*)`", re.DOTALL)


def open_input(file: Path, error: Failure, missing: str = "") -> BinaryIO:
    """Open a regular file for reading; what is behind a link counts.

    Args:
        missing: what to type next where there is no file, added to the message.

    Raises:
        error: it does not exist, is something else than a file, or cannot be read.
    """
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise error(f"{file} is a directory, expected a file")
        if not stat.S_ISREG(mode):
            raise error(f"{file} is no regular file: devices and pipes are not read")
        return file.open("rb")
    except FileNotFoundError:
        if file.is_symlink():
            raise error(f"{file} is a link to {file.readlink()}, which does not exist") from None
        raise error(f"{file} does not exist{missing}") from None
    except (OSError, ValueError) as reason:  # a name may be too long, or hold NUL
        raise error(f"{file} cannot be read: {getattr(reason, 'strerror', None) or reason}") from reason


def read_input(file: Path, error: Failure, limit: int = LARGEST_DOCUMENT, missing: str = "") -> bytes:
    """Read a file of at most ``limit`` bytes. Raises as :func:`open_input`."""
    with open_input(file, error, missing) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise error(f"{file} has {size:,} bytes, expected at most {limit:,}")
        try:
            return stream.read(limit)
        except OSError as reason:
            raise error(f"{file} cannot be read: {reason.strerror}") from reason


def read_json(file: Path, kind: type[_T], error: Failure, missing: str = "") -> _T:
    """Read a JSON file of type ``kind``. Raises as :func:`open_input` and :func:`decode_json`."""
    return decode_json(read_input(file, error, missing=missing), kind, str(file), error)


def decode_json(data: bytes, kind: type[_T], where: str, error: Failure) -> _T:
    """Decode UTF-8, with or without a byte order mark, into ``kind``; ``where`` names its origin in messages.

    Raises:
        error: no JSON, or of another type: with the place in it, ``plan.json: $.tensors[3].rank: expected int >= 1``.
    """
    try:
        return msgspec.json.decode(data.removeprefix(_BYTE_ORDER_MARK), type=kind)
    except msgspec.ValidationError as reason:
        raise error(f"{where}: {_sentence(reason)}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{where} is no UTF-8: {reason.reason} at byte {reason.start} of a text") from None
    except (msgspec.DecodeError, RecursionError) as reason:
        raise error(f"{where} is no JSON: {_why_not(data) or reason}") from None


def read_foreign_json(file: Path, error: Failure) -> Any:
    """Parse a JSON file of others as their own libraries do: infinities are read, and byte order marks are not.

    Raises:
        error: as :func:`open_input`, or it is no JSON, or one that no library takes.
    """
    data = read_input(file, error)
    try:
        parsed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as reason:
        raise error(f"{file} cannot be read as JSON: {_why_not(data) or reason}") from reason
    if _HALF_A_PAIR.search(data):
        raise error(f"{file} cannot be read as JSON: {_why_not(data)}")
    return parsed


def decode_strictly(data: bytes, kind: type[_T], where: str, error: Failure, also: tuple[str, ...] = ()) -> _T:
    """Decode a document of our own: as :func:`decode_json`, and no key may be unknown, or stand in an object twice.

    Args:
        also: keys of the outermost object beside those of ``kind``.
    """
    value = decode_json(data, kind, where, error)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise error(f"{where}: an object has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return found

    # Decoding looks at no text, number or depth of what it has no place for.
    try:
        raw = json.loads(data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} is no JSON: {_why_not(data) or reason}") from None
    refuse_unknown_keys(raw, value, where, error, also)
    return value


def refuse_unknown_keys(raw: Any, value: object, where: str, error: Failure, also: tuple[str, ...] = ()) -> None:
    """Raises ``error`` if ``raw``, from which ``value`` was decoded, has keys that it did not take."""
    if isinstance(raw, dict):
        raw = {key: inner for key, inner in raw.items() if key not in also}
    place = _unknown_key(raw, value, "$")
    if place:
        raise error(f"{where}: {place}: unknown key")


def _unknown_key(raw: Any, value: Any, place: str) -> str:
    """Look where there are objects; ``value`` has mappings or dataclasses there."""
    if isinstance(raw, dict):
        known = value if isinstance(value, Mapping) else vars(value)
        for key, inner in raw.items():
            if key not in known:
                return f"{place}.{key}"
            if isinstance(inner, dict | list) and (found := _unknown_key(inner, known[key], f"{place}.{key}")):
                return found
    elif isinstance(raw, list) and raw and isinstance(raw[0], dict):
        for index, (inner, of_it) in enumerate(zip(raw, value, strict=True)):
            if found := _unknown_key(inner, of_it, f"{place}[{index}]"):
                return found
    return ""


def read_toml(file: Path, error: Failure, missing: str = "") -> dict[str, Any]:
    """Parse a TOML file; :func:`convert` gives its parts types. Raises as :func:`open_input`, or if it is none."""
    return decode_toml(read_input(file, error, missing=missing), str(file), error)


def decode_toml(data: bytes, where: str, error: Failure) -> dict[str, Any]:
    """Parse TOML. Raises ``error`` if it is none."""
    try:
        return tomllib.loads(data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as reason:
        raise error(f"{where} is no UTF-8: {reason.reason} at byte {reason.start}") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{where} is no TOML: {reason}") from None


def convert(value: Any, kind: type[_T], where: str, error: Failure) -> _T:
    """Check parsed data against ``kind``. Raises ``error`` as :func:`decode_json`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as reason:
        raise error(f"{where}: {_sentence(reason)}") from None
    except RecursionError as reason:
        raise error(f"{where}: {reason}") from None


def builtins(value: Any) -> Any:
    """Turn a value of a schema into dictionaries, lists and scalars, in the order of its fields."""
    return msgspec.to_builtins(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """What msgspec does not know: read-only mappings, and subclasses such as PyTorch's version and NumPy's float."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str | float):
        return str(value) if isinstance(value, str) else float(value)
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def read_only(value: Any) -> Any:
    """Wrap dictionaries, and those in them, so that nobody can write into them."""
    if type(value) is dict:
        return MappingProxyType({key: read_only(inner) for key, inner in value.items()})
    return value


class ReadOnly:
    """A base of frozen dataclasses, whose mappings become read-only."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is dict:
                object.__setattr__(self, name, read_only(value))


def _sentence(reason: msgspec.ValidationError) -> str:
    """``$.tensors[3].rank: expected int >= 1``."""
    match = _PLACE.fullmatch(str(reason))
    problem, place = (match["problem"], match["place"]) if match else (str(reason), "$")
    return f"{place}: {problem[:1].lower()}{problem[1:]}".replace("`", "")


def _why_not(data: bytes) -> str:
    """Better words for two things that msgspec takes for other damage; empty for the rest."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as reason:  # UTF-16 and other encodings, binary files
        return f"it is no UTF-8 ({reason.reason} at byte {reason.start})"
    half = _HALF_A_PAIR.search(data)
    return f"half a surrogate pair at byte {half.start()}" if half else ""
