"""ggml's own quantizers, called through ctypes in xllamacpp's shared library. The only file that knows that library.

Where it cannot be loaded (not installed, or a build that hides its symbols, as on Windows)
:mod:`converters.gguf.portable` quantizes the simple types, to the same bytes. For q2_0 ggml's quantizer has weights of
three values in mind, and that of :mod:`converters.gguf.two_bits` stands in its place.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from acip_export import machine
from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.finite import is_finite
from acip_export.units import ceil_div
from acip_export.weight_types import types_of, weight_type
from converters.gguf import portable, two_bits
from converters.gguf.types import TYPE_IDS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Weights that one call quantizes: large enough to forget the call, small enough for its float32 copy to stay in a
# processor's cache, and to share even a small tensor evenly among threads.
_CHUNK_WEIGHTS = 1 << 18
# Columns that calibration never excited get this share of the mean: some quantizers divide by a block's sum.
_IMPORTANCE_FLOOR = 1e-6


def library_path() -> Path | None:
    """xllamacpp's shared library, or ``None`` when it is not installed. Imports nothing."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = [*folder.glob("xllamacpp*.so"), *folder.glob("xllamacpp*.pyd"), *folder.glob("xllamacpp*.dylib")]
    return found[0] if found else None


@cache
def load_library() -> ctypes.CDLL | None:
    """The library with the prototypes of the functions used here, or ``None`` when it cannot be trusted."""
    path = library_path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_init.argtypes = (ctypes.c_int,)
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        )
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        for sizes in (library.ggml_type_size, library.ggml_blck_size):
            sizes.argtypes = (ctypes.c_int,)
        library.ggml_type_size.restype = ctypes.c_size_t
        library.ggml_blck_size.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        logger.warning("%s cannot be used (%s); only %s can be quantized", path, error, ", ".join(portable.TYPES))
        return None
    problem = _self_check(library)
    if problem:
        logger.warning("%s is not the ggml that this tool knows: %s", path, problem)
        return None
    return library


def _self_check(library: ctypes.CDLL) -> str | None:
    for form in types_of("gguf"):
        number = TYPE_IDS[form.name]
        found = (library.ggml_blck_size(number), library.ggml_type_size(number))
        if found != (form.block, form.block_bytes):
            return f"{form.name} has blocks of {found}, expected {(form.block, form.block_bytes)}"
    ramp = np.linspace(-127, 127, 32, dtype=np.float32)
    out = np.zeros(34, np.uint8)
    written = _quantize_rows(library, "q8_0", ramp.reshape(1, 32), out, None)
    # The largest weight is 127 quanta, so the scale is 1 and the quanta are the rounded weights.
    if written != 34 or out[:2].view(np.float16)[0] != 1 or (out[2:].view(np.int8) != np.round(ramp)).any():
        return "its q8_0 quantizer gives unexpected bytes"
    return None


def _quantize_rows(library: ctypes.CDLL, name: str, rows: Floats, out: Bytes, importance: Floats | None) -> int:
    written: int = library.ggml_quantize_chunk(
        TYPE_IDS[name],
        rows.ctypes.data,
        out.ctypes.data,
        0,
        rows.shape[0],
        rows.shape[1],
        None if importance is None else importance.ctypes.data,
    )
    return written


def quantizer() -> str:
    """Name what :func:`quantize` rounds with, and its version."""
    package = "gguf" if load_library() is None else "xllamacpp"
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return "none"


def require(name: str) -> None:
    """Raises MissingExtraError when nothing installed can quantize to ``name``."""
    if weight_type("gguf", name).is_float or load_library() is not None:
        return
    if name in portable.TYPES and importlib.util.find_spec("gguf") is not None:
        return
    raise MissingExtraError("xllamacpp (with ggml's symbols)", "gguf", f"quantizing to {name}")


def quantize(
    weight: torch.Tensor, name: str, importance: torch.Tensor | None = None, threads: int | None = None
) -> Bytes:
    """The rows of ``weight`` in the format ``name``.

    Args:
        weight: (rows, columns) or (columns,), any float dtype; converted to float32 chunk by chunk.
        importance: (columns,) weights of the squared rounding error, as llama.cpp's imatrix.
        threads: defaults to the processors that this process may use.

    Returns:
        uint8 (bytes,), exactly ``weight_type("gguf", name).nbytes(rows, columns)``.

    Raises:
        UnsupportedError: rows that do not fit the blocks, a needed importance that is missing, or float16 overflow.
        MissingExtraError: see :func:`require`.
    """
    import torch

    form = weight_type("gguf", name)
    matrix = weight.detach().reshape(-1, weight.shape[-1])
    rows, columns = matrix.shape
    if not form.fits(columns):
        raise UnsupportedError(
            f"rows of {columns} weights do not fit {name} blocks of {form.block}; choose another type"
        )
    if form.is_float:
        return _to_float(matrix, name)
    if form.needs_importance and importance is None:
        raise UnsupportedError(
            f"{name} needs importance weights; rank the model with statistics or choose another type"
        )
    require(name)
    out = np.empty(form.nbytes(rows, columns), np.uint8)
    weights = None if importance is None else _importance(importance, columns)
    row_bytes = form.nbytes(1, columns)
    step = max(1, _CHUNK_WEIGHTS // columns)
    fill = _row_quantizer(name, weights)
    starts = iter(range(0, rows, step))  # shared: whichever thread is free takes the next rows

    def work() -> None:
        buffer = matrix.new_empty((min(step, rows), columns), dtype=torch.float32)
        for start in starts:
            stop = min(start + step, rows)
            chunk = buffer[: stop - start].copy_(matrix[start:stop]).numpy()
            target = out[start * row_bytes : stop * row_bytes]
            fill(chunk, target)

    count = min(threads or machine.processors(), ceil_div(rows, step))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        for done in [pool.submit(work) for _ in range(count)]:
            done.result()
    return out


def _row_quantizer(name: str, importance: Floats | None) -> Callable[[Floats, Bytes], None]:
    """Return what writes the bytes of rows of a quantized type; threads may share it."""
    library = load_library()

    def ours(rows: Floats, out: Bytes) -> None:
        out[:] = two_bits.quantize(rows, importance)

    def ported(rows: Floats, out: Bytes) -> None:
        out[:] = portable.quantize(rows, name, importance)

    def ggmls(rows: Floats, out: Bytes) -> None:
        assert library is not None
        if _quantize_rows(library, name, rows, out, importance) != out.nbytes:
            raise AssertionError(f"ggml wrote another number of bytes than {name} takes")

    if name == "q2_0":
        return ours
    if library is None:
        return ported
    library.ggml_quantize_init(TYPE_IDS[name])  # builds lookup tables; here once, not in every thread
    return ggmls


def dequantize(data: Bytes, shape: tuple[int, ...], name: str) -> Floats:
    """float32 of ``shape`` from bytes of the format ``name``, by ggml's own code.

    Raises:
        MissingExtraError: a quantized type without xllamacpp.
    """
    if name == "f32":
        single: Floats = data.view(np.float32).reshape(shape)
        return single
    if name == "f16":
        half: Floats = data.view(np.float16).astype(np.float32).reshape(shape)
        return half
    if name == "bf16":
        widened: Floats = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return widened
    library = load_library()
    if library is None:
        raise MissingExtraError("xllamacpp (with ggml's symbols)", "gguf", f"reading {name}")
    function: Any = getattr(library, f"dequantize_row_{name.replace('_k', '_K')}")
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    data = np.ascontiguousarray(data)
    out = np.empty(shape, np.float32)
    function(data.ctypes.data, out.ctypes.data, out.size)
    return out


def _to_float(matrix: torch.Tensor, name: str) -> Bytes:
    import torch

    converted = matrix.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]).contiguous()
    if name == "f16" and not is_finite(converted):
        raise UnsupportedError("a weight is too large for f16; choose bf16 or f32 for this tensor")
    found: Bytes = converted.view(torch.uint8).numpy().reshape(-1)
    return found


def _importance(importance: torch.Tensor, columns: int) -> Floats:
    weights = np.ascontiguousarray(importance.detach().float().numpy())
    if weights.shape != (columns,):
        raise ValueError(f"importance of shape {weights.shape}, expected ({columns},)")
    mean = float(weights.mean())
    if not mean > 0 or not np.isfinite(mean):
        return np.ones(columns, np.float32)
    floored: Floats = np.maximum(weights, np.float32(mean * _IMPORTANCE_FLOOR))
    return floored
