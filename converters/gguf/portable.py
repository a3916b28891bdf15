"""Quantizes the simple block formats without ggml's library, to ggml's bytes: q8_0 and q4_0."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TYPES = ("q8_0", "q4_0")

_BLOCK = 32
# A quantum of q4_0 has four bits: -8 to 7.
_LEVELS = 8
# ggml takes a block whose largest weight is below this for zeros (GROUP_MAX_EPS).
_ZERO = np.float32(1e-15)
# ggml tries scales for which the largest weight becomes 8 quanta, give or take this many tenths of one.
_MOST_TENTHS = 9

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def quantize(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """Return the bytes of ``rows`` (rows, columns) in the type ``name``, as ggml writes them.

    Args:
        importance: (columns,) positive weights of the squared rounding error; ggml's q8_0 has no use for them.
    """
    import gguf

    if name == "q4_0" and importance is not None:
        return _weighted_q4_0(rows, importance)
    plain: Bytes = gguf.quantize(rows, gguf.GGMLQuantizationType[name.upper()])
    return plain.reshape(-1)


def _weighted_q4_0(rows: Floats, importance: Floats) -> Bytes:
    """Follow ``quantize_row_q4_0_impl`` in float32 and in its order of additions, which its bytes depend on."""
    with np.errstate(all="ignore"):  # what overflows becomes infinite, as in C
        mean_square = _sum(rows * rows) / np.float32(rows.shape[1])
        weights = (importance * np.sqrt(mean_square + rows * rows)).reshape(-1, _BLOCK)
        scales, levels = _best_scale(rows.reshape(-1, _BLOCK), weights)
        scale_bytes = scales.astype(np.float16).view(np.uint8)
    shifted = (levels + _LEVELS).astype(np.uint8)
    half = _BLOCK // 2
    packed = shifted[:, :half] | (shifted[:, half:] << 4)
    return np.concatenate((scale_bytes, packed), axis=1).reshape(-1)


def _best_scale(blocks: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Follow ``make_qx_quants``: the scale of least weighted error among a few, and the quanta.

    Args:
        blocks, weights: (blocks, 32).

    Returns:
        (blocks, 1) and (blocks, 32).
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), 1)
    is_zero = np.abs(largest) < _ZERO
    divisor = np.where(is_zero, np.float32(1), largest)
    scales = np.zeros_like(divisor)
    levels = np.zeros_like(blocks)
    best = np.zeros_like(divisor)
    for tenths in (0, *range(-_MOST_TENTHS, 0), *range(1, _MOST_TENTHS + 1)):
        inverse = -(np.float32(_LEVELS) + np.float32(0.1) * np.float32(tenths)) / divisor
        rounded = np.clip(np.rint(inverse * blocks), -_LEVELS, _LEVELS - 1)
        weighted = weights * rounded
        products = _sum(weights * blocks * rounded)
        squares = _sum(weighted * rounded)
        better = (tenths == 0) | ((squares > 0) & (products * products > best * squares))
        scale = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
        scales = np.where(better, scale, scales)
        best = np.where(better, scale * products, best)
        levels = np.where(better, rounded, levels)
    # ggml stores the lowest quantum for a block of zeros.
    return np.where(is_zero, np.float32(0), scales), np.where(is_zero, np.float32(-_LEVELS), levels)


def _sum(terms: Floats) -> Floats:
    """Add the columns of a matrix from left to right, as ggml does; numpy's own sum adds in pairs."""
    total: Floats = np.add.accumulate(terms, axis=1)[:, -1:]
    return total
