"""Reading safetensors headers without torch, and writing files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from acip_export.errors import InputError, OutputError
from acip_export.io.frozen import frozen
from acip_export.io.inputs import Count, Failure, decode_json, open_input, read_foreign_json
from acip_export.io.placeholders import refuse_placeholder
from acip_export.io.stamps import Stamp, stamp_of

logger = logging.getLogger(__name__)

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
# Parts of a byte: in quantized checkpoints only, which are read to be named.
_DTYPE_BITS = {**{name: 8 * nbytes for name, nbytes in DTYPE_BYTES.items()}, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_LARGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 64
# Far beyond any model in one file; each takes time.
_MOST_TENSORS = 100_000


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of a safetensors file; ``offset`` counts from the start of the file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def read_safetensors_header(file: Path, error: type[InputError]) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked against its size.

    Raises:
        error: with a message that says what is wrong, for anything that is not a whole, well-formed file.
    """
    try:
        refuse_placeholder(file, error)
        with open_input(file, error) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                told = f"{size:,} bytes, header of {length:,} expected"
                raise error(f"{file} is truncated or no safetensors file: {told}")
            header = stream.read(length)
    except OSError as reason:
        raise error(f"{file} cannot be read: {reason}") from reason
    raw = decode_json(header, dict[str, msgspec.Raw], f"{file}: header", error)
    metadata = decode_json(bytes(raw.pop("__metadata__", b"{}")), dict[str, str], f"{file}: metadata", error)
    if len(raw) > _MOST_TENSORS:
        raise error(f"{file} is damaged: it has more than {_MOST_TENSORS:,} tensors")
    entries = {name: _entry(file, name, value, 8 + length, error) for name, value in raw.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            how = "overlaps what is" if entry.offset < end else "leaves a gap to what is"
            raise error(
                f"{file} is damaged: tensor {name!r} {how} before it (at byte {entry.offset:,}, expected at {end:,}); "
                "fetch or save the file again"
            )
        end += entry.nbytes
    if end != size:
        raise error(
            f"{file} is truncated or padded: {size:,} bytes, {end:,} expected from its header; "
            "fetch or save the file again"
        )
    return entries, metadata


def safetensors_header(file: Path, error: type[InputError]) -> dict[str, HeaderEntry]:
    """The tensors of :func:`read_safetensors_header`."""
    return read_safetensors_header(file, error)[0]


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor's entry in the header, as the format has it."""

    dtype: str
    shape: Annotated[tuple[Count, ...], Meta(max_length=_MOST_DIMENSIONS)]
    data_offsets: tuple[Count, Count]


def _entry(file: Path, name: str, value: msgspec.Raw, start: int, error: type[InputError]) -> HeaderEntry:
    stored = decode_json(bytes(value), _Stored, f"{file}: header entry of {name!r}", error)
    shape, dtype, (begin, end) = stored.shape, stored.dtype, stored.data_offsets
    if dtype not in _DTYPE_BITS:
        raise error(f"{file}: tensor {name!r} has the unknown dtype {dtype!r}")
    if 8 * (end - begin) != prod(shape) * _DTYPE_BITS[dtype]:
        what = f"tensor {name!r} of shape {shape} and dtype {dtype}"
        raise error(f"{file}: {what} does not fill its {end - begin:,} bytes")
    return HeaderEntry(shape, dtype, start + begin, end - begin)


def read_json_object(file: Path, error: type[InputError]) -> Mapping[str, Any]:
    """The JSON object in ``file``, read-only at every level; see :func:`acip_export.io.frozen.thawed`.

    What was read last is remembered: a plan asks for the same few files many times.

    Raises:
        error: unreadable, not JSON, or something else than an object.
    """
    if file.is_file():
        refuse_placeholder(file, error)
    return _json_object(file, error, stamp_of(file))  # type: ignore[arg-type]  # mypy: classes can be hashed


@lru_cache(maxsize=16)
def _json_object(file: Path, error: Failure, stamp: Stamp | None) -> Mapping[str, Any]:  # noqa: ARG001 - part of the key
    data = read_foreign_json(file, error)
    if not isinstance(data, dict):
        raise error(f"{file} holds a {type(data).__name__}, expected a JSON object")
    found: Mapping[str, Any] = frozen(data)
    return found


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor; nothing but the tensor at hand is in memory.

    Used as a context manager. Tensors are written in the order in which they were declared; leaving with some of them
    missing is an error. ``sha256`` is that of everything written so far: the file need not be read again for it.
    """

    def __init__(
        self, file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for name, (dtype, shape) in tensors.items():
            nbytes = prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
            position += nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
        self._pending = {name: (d, prod(s) * DTYPE_BYTES[d]) for name, (d, s) in tensors.items()}
        self._digest = hashlib.sha256()
        self._stream = file.open("wb")
        self._append(len(encoded).to_bytes(8, "little") + encoded)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._digest.update(data)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Append the next tensor's little-endian bytes.

        Raises:
            ValueError: not the next declared tensor, or not its number of bytes.
        """
        expected = next(iter(self._pending), None)
        if name != expected or memoryview(data).nbytes != self._pending[name][1]:
            raise ValueError(f"wrote {name} with {memoryview(data).nbytes:,} bytes, expected {expected}")
        del self._pending[name]
        self._append(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._pending:
            raise ValueError(
                f"{len(self._pending)} declared tensors were not written, first {next(iter(self._pending))}"
            )


# What only writing can meet: no such error is about a file that is read.
NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EROFS, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}


@contextmanager
def _room(target: Path) -> Iterator[None]:
    """Raises OutputError where the system has no room for ``target``, at any depth below the block."""
    try:
        yield
    except OSError as reason:
        if reason.errno not in NO_ROOM:
            raise
        raise _no_output(target, reason) from reason


def _no_output(target: Path, reason: OSError) -> OutputError:
    instead = "Make room, or choose" if reason.errno in NO_ROOM else "Choose"
    return OutputError(
        f"{target} cannot be written: {reason.strerror}; nothing was left there. {instead} another place with -o"
    )


@contextmanager
def scratch_directory(target: Path, suffix: str) -> Iterator[Path]:
    """Yield a new hidden directory beside ``target`` that is gone when the block ends, however it ends.

    The name is chosen before the directory is made: an interruption right after that finds it removed too, which
    ``tempfile.TemporaryDirectory`` cannot promise.

    Raises:
        OutputError: it cannot be made, or the disk is full.
    """
    directory = target.parent / f".{target.name}.{secrets.token_hex(4)}{suffix}"
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700)
        except OSError as reason:
            raise _no_output(target, reason) from reason
        with _room(target):
            yield directory
    finally:
        remove_directory(directory)


def _nothing() -> None:
    pass


@contextmanager
def new_directory(target: Path, allow: Callable[[], None] = _nothing) -> Iterator[Path]:
    """Yield a temporary directory beside ``target`` that becomes ``target`` when the block ends without an exception.

    On any exception, Ctrl-C included, the temporary directory is removed and an existing ``target`` is untouched.

    Args:
        allow: raises where ``target`` may not be replaced; asked at the end too, as something may have come there.

    Raises:
        OutputError: it cannot be made or replaced, or the disk is full.
    """
    allow()
    with scratch_directory(target, ".tmp") as temporary:
        yield temporary
        allow()
        temporary.chmod(0o755)
        exchange(temporary, target)


def exchange(new: Path, target: Path) -> None:
    """Put ``new`` where ``target`` is, by renames: what was there is back if they fail, and removed when they have not.

    A crash between the two leaves the old directory, whole, beside the place; see :func:`remove_leftovers`.

    Raises:
        OutputError: it cannot be replaced.
    """
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
    try:
        if target.exists():
            target.replace(old)
        new.replace(target)
    except OSError as reason:
        raise _not_replaced(target, reason) from reason
    finally:
        if old.exists():
            if target.exists():
                remove_directory(old)
            else:
                old.replace(target)


def remove_directory(directory: Path) -> None:
    """Remove a directory with all that is in it, or a link to one, even when Ctrl-C is pressed in the middle."""
    if directory.is_symlink():
        directory.unlink()
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _not_replaced(target: Path, reason: OSError) -> OutputError:
    return OutputError(f"{target} cannot be replaced: {reason.strerror}; it is as it was. Choose another place with -o")


@contextmanager
def new_file(target: Path, allow: Callable[[], None] = _nothing) -> Iterator[Path]:
    """Like :func:`new_directory`, for one file.

    It is written in a hidden directory of its own: libraries that write to a temporary file beside the one they are
    given (safetensors does) leave that one there too when they are killed. Its name there is short, for systems that
    limit whole paths, and has no suffix, so that nobody who looks for files of a kind takes a half-written one.
    """
    allow()
    with scratch_directory(target, ".tmp") as directory:
        temporary = directory / "new"
        try:
            temporary.touch(mode=0o600)
        except OSError as reason:
            raise _no_output(target, reason) from reason
        yield temporary
        allow()
        temporary.chmod(0o644)
        try:
            temporary.replace(target)
        except OSError as reason:
            raise _not_replaced(target, reason) from reason


def keep(file: Path, data: bytes, otherwise: str) -> bool:
    """Write an entry of a cache, whole or not at all. A place that cannot be written to is no error; ``otherwise`` says
    what is done again then.

    Returns:
        Whether it was written.
    """
    try:
        with new_file(file) as temporary:
            temporary.write_bytes(data)
    except (OSError, OutputError) as reason:
        logger.warning("%s is not kept (%s); %s again next time", file, reason, otherwise)
        return False
    return True


def user_cache() -> Path:
    """Where this tool keeps what is expensive to make and depends on no model of the user's; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acip-export"


def remove_leftovers(target: Path) -> bool:
    """Remove what processes that were killed while they wrote ``target`` left of it; no other may be writing it.

    Returns:
        Whether one was killed between the two renames of :func:`exchange`: what was there before is back.
    """
    digit = "[0-9a-f]"
    left = [
        leftover
        for suffix in (".tmp", ".old")
        for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}.{8 * digit}{suffix}"))
    ]
    back = False
    for leftover in left:
        with suppress(OSError):  # not ours to remove
            if leftover.suffix == ".old" and not target.exists():
                leftover.replace(target)
                back = True
            elif leftover.is_dir():
                remove_directory(leftover)
            else:
                leftover.unlink(missing_ok=True)
    return back
