"""Reading a written GGUF back with a reader that is not ours: ggml's own, the one that the runtime opens it with.

Where no ggml library loads, gguf-py's, which makes objects of every token and takes seconds for a large vocabulary.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from acip_export.errors import VerificationError
from converters.gguf.ggml_library import load_library
from converters.gguf.types import TYPE_IDS
from converters.gguf.writer import Metadata, TensorSpec, file_bytes, offsets

_DIMENSIONS = 4  # GGML_MAX_DIMS

# (name, extents with the fastest first and filled up with ones, type, offset from the start of the data)
_Placed = tuple[str, tuple[int, ...], int, int]


def check_structure(file: Path, metadata: Metadata, tensors: Sequence[TensorSpec]) -> None:
    """Read the file back and compare keys, names, shapes, types and offsets, in their order, and its length.

    Raises:
        VerificationError: any of them differs.
    """
    size, planned = file.stat().st_size, file_bytes(metadata, tensors)
    if size != planned:  # ggml's reader looks at the head only
        raise VerificationError(f"{file} does not read back: it has {size:,} bytes, {planned:,} were written")
    library = load_library()
    keys, found = _by_gguf_py(file) if library is None else _by_ggml(library, file)
    expected = [
        (t.name, _filled(reversed(t.shape)), TYPE_IDS[t.type], offset)
        for t, offset in zip(tensors, offsets(tensors), strict=True)
    ]
    if found != expected or keys != list(metadata):
        different = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), "keys or counts")
        raise VerificationError(f"{file} reads back differently from what was written: {different}")


def _filled(extents: Iterable[int]) -> tuple[int, ...]:
    found = tuple(int(extent) for extent in extents)
    return found + (1,) * (_DIMENSIONS - len(found))


def _by_gguf_py(file: Path) -> tuple[list[str], list[_Placed]]:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError) as error:
        raise VerificationError(f"{file} does not read back: {error}") from error
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    return keys, [
        (t.name, _filled(t.shape.tolist()), int(t.tensor_type), int(t.data_offset) - reader.data_offset)
        for t in reader.tensors
    ]


class _Params(ctypes.Structure):
    """``struct gguf_init_params``: no context, so that nothing but the head is read."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _by_ggml(library: ctypes.CDLL, file: Path) -> tuple[list[str], list[_Placed]]:
    number, index = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64)
    for name, arguments, result in (
        ("gguf_init_from_file", (ctypes.c_char_p, _Params), ctypes.c_void_p),
        ("gguf_free", (ctypes.c_void_p,), None),
        ("gguf_get_n_kv", (ctypes.c_void_p,), number),
        ("gguf_get_key", index, ctypes.c_char_p),
        ("gguf_get_n_tensors", (ctypes.c_void_p,), number),
        ("gguf_get_tensor_name", index, ctypes.c_char_p),
        ("gguf_get_tensor_ne", index, ctypes.POINTER(number * _DIMENSIONS)),
        ("gguf_get_tensor_type", index, ctypes.c_int),
        ("gguf_get_tensor_offset", index, ctypes.c_size_t),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    head = library.gguf_init_from_file(os.fsencode(file), _Params(True, None))
    if not head:
        raise VerificationError(f"{file} does not read back: ggml's reader refuses it (it says why on stderr)")
    try:
        keys = [library.gguf_get_key(head, place).decode() for place in range(library.gguf_get_n_kv(head))]
        return keys, [
            (
                library.gguf_get_tensor_name(head, place).decode(),
                tuple(library.gguf_get_tensor_ne(head, place).contents),
                library.gguf_get_tensor_type(head, place),
                library.gguf_get_tensor_offset(head, place),
            )
            for place in range(library.gguf_get_n_tensors(head))
        ]
    finally:
        library.gguf_free(head)
