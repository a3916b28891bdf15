"""Symmetric block quantization as ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` read it.

A row of K weights is cut into ``ceil(K / block)`` blocks. A block holds unsigned codes of ``bits`` bits, lowest first
in each byte, and one float32 scale: ``w = (code - 2^(bits-1)) * scale``. Scales may be negative: the block's largest
weight then takes the code of larger magnitude, as in ggml's q4_0.

numpy on purpose: small arrays in a few threads of our own are several times faster here than torch's intra-operator
threads, and do not collapse when the machine is busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from acip_export.formats import WeightFormat

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

# Signed codes that the largest weight of a block is tried at, as multiples of 2^(bits-1). Clipping the tail pays where
# codes are few; 8 bits have so many that only the two ends matter. More candidates lower the error by under 1 %.
_TARGETS: dict[int, tuple[float, ...]] = {
    8: (-1.0, 0.992),
    4: (-1.25, -1.12, -1.04, -0.96, -0.88, -0.82, 0.9),
    2: (-1.3, -1.1, -0.95, -0.8, -0.68, 0.55, 0.7),
}
# A column that the calibration text never excited still counts a little.
_IMPORTANCE_FLOOR = np.float32(1e-3)
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """Rows of a quantized matrix.

    Attributes:
        codes: (rows, blocks, block * bits / 8) uint8. scales: (rows, blocks) of :func:`scale_type`.
    """

    codes: Codes
    scales: NDArray[np.float32] | NDArray[np.float16]


def bits_of(fmt: WeightFormat) -> int:
    """Bits of one code of a quantized ONNX format."""
    return (fmt.block_bytes - fmt.item_bytes) * 8 // fmt.block


def scale_type(fmt: WeightFormat) -> np.dtype[np.float32] | np.dtype[np.float16]:
    """Of the scales, and of every other number of a graph with this format."""
    return np.dtype(np.float32) if fmt.item_bytes == 4 else np.dtype(np.float16)


def quantize(weight: Floats, fmt: WeightFormat, importance: Floats | None = None) -> Quantized:
    """Codes and scales that nearly minimise ``sum(importance * (weight - dequantized)^2)`` in every block.

    Scale candidates put the block's largest weight at different codes; each is refitted by least squares to its own
    codes, the best is rounded and fitted once more. Working memory: about six copies of ``weight``; give few rows.

    Args:
        weight: (rows, columns) float32. importance: (columns,) non-negative float32, ``None`` for equal weights.
    """
    bits = bits_of(fmt)
    blocks = _blocks(weight, fmt.block)
    weights = None if importance is None else _column_weights(importance, fmt.block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    inverse = _reciprocal(largest) * np.float32(2 ** (bits - 1))

    best_gain, scale = np.zeros_like(largest), np.zeros_like(largest)
    for target in _TARGETS[bits]:
        gain, fitted = _fit(blocks, _round(blocks, inverse * np.float32(target), bits), weights)
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(scale, fitted, where=better)
    codes = _round(blocks, _reciprocal(scale), bits)
    _, scale = _fit(blocks, codes, weights)
    if fmt.item_bytes == 4:
        return Quantized(_pack(codes, bits), scale)
    most = np.finfo(np.float16).max
    return Quantized(_pack(codes, bits), np.clip(scale, -most, most).astype(np.float16))


def dequantize(quantized: Quantized, fmt: WeightFormat, columns: int) -> Floats:
    """The (rows, columns) float32 matrix that the runtime multiplies with."""
    bits = bits_of(fmt)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (quantized.codes[..., None] >> shifts) & np.uint8(2**bits - 1)
    signed = codes.reshape(*quantized.scales.shape, fmt.block).astype(np.float32) - np.float32(2 ** (bits - 1))
    weight: Floats = (signed * quantized.scales[..., None].astype(np.float32)).reshape(len(signed), -1)[:, :columns]
    return weight


def _blocks(weight: Floats, block: int) -> Floats:
    rows, columns = weight.shape
    if columns % block:
        weight = np.pad(weight, ((0, 0), (0, -columns % block)))
    return weight.reshape(rows, -1, block)


def _column_weights(importance: Floats, block: int) -> Floats:
    """(1, blocks, block) with maximum 1."""
    positive = np.maximum(importance, 0)
    positive = positive + _IMPORTANCE_FLOOR * positive.mean() + _TINY
    return _blocks((positive / positive.max())[None], block)


def _reciprocal(values: Floats) -> Floats:
    """1 / values, and 0 where that overflows: a block of zeros, or of denormals, which becomes zeros."""
    safe: Floats = np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > _TINY)
    return safe


def _round(blocks: Floats, inverse: Floats, bits: int) -> Floats:
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, out=codes)


def _fit(blocks: Floats, codes: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """Error removed by the least-squares scale of ``codes``, and that scale; (rows, blocks) each."""
    weighted = codes if weights is None else codes * weights
    cross: Floats = np.einsum("rbk,rbk->rb", weighted, blocks)
    square: Floats = np.einsum("rbk,rbk->rb", weighted, codes)
    scale: Floats = np.divide(cross, square, out=np.zeros_like(cross), where=square > 0)
    return cross * scale, scale


def _pack(codes: Floats, bits: int) -> Codes:
    lanes = 8 // bits
    unsigned = (codes + np.float32(2 ** (bits - 1))).astype(np.uint8).reshape(*codes.shape[:2], -1, lanes)
    packed = unsigned[..., 0].copy()
    for lane in range(1, lanes):
        packed |= unsigned[..., lane] << np.uint8(lane * bits)
    return packed
