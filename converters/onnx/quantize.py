"""Block quantization as ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` read it.

A row of K weights is cut into ``ceil(K / block)`` blocks. A block holds unsigned codes of ``bits`` bits, lowest first
in each byte, one float scale and a zero point: ``w = (code - zero) * scale``. Symmetric formats have no zero points
in the file; theirs is ``2^(bits-1)``, and scales may be negative: the block's largest weight then takes the code of
larger magnitude, as in ggml's q4_0. Asymmetric formats store a zero point of ``bits`` bits for every block, packed as
the codes are.

numpy on purpose: small arrays in a few threads of our own are several times faster here than torch's intra-operator
threads, and do not collapse when the machine is busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acip_export.weight_types import WeightType

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

# Signed codes that the largest weight of a block is tried at, as multiples of 2^(bits-1). Clipping the tail pays where
# codes are few; 8 bits have so many that only the two ends matter. More candidates lower the error by under 1 %.
_TARGETS: dict[int, tuple[float, ...]] = {
    8: (-1.0, 0.992),
    4: (-1.25, -1.12, -1.04, -0.96, -0.88, -0.82, 0.9),
    2: (-1.3, -1.1, -0.95, -0.8, -0.68, 0.55, 0.7),
}
# Ends of an asymmetric block as shares of its smallest and largest weight. Clipping both, or the longer tail alone.
_ENDS: dict[int, tuple[tuple[float, float], ...]] = {
    8: ((1.0, 1.0),),
    4: ((1.0, 1.0), (0.93, 0.93), (0.86, 0.86), (0.79, 0.79), (1.0, 0.86), (0.86, 1.0)),
    2: ((0.95, 0.95), (0.8, 0.8), (0.65, 0.65), (0.95, 0.65), (0.65, 0.95), (0.5, 0.8), (0.8, 0.5)),
}
# A column that the calibration text never excited still counts a little.
_IMPORTANCE_FLOOR = np.float32(1e-3)
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """Rows of a quantized matrix.

    Attributes:
        codes: (rows, blocks, block * bits / 8) uint8. scales: (rows, blocks) of :func:`scale_type`.
        zeros: (rows, ceil(blocks * bits / 8)) uint8, packed zero points; ``None``: symmetric.
    """

    codes: Codes
    scales: NDArray[np.float32] | NDArray[np.float16]
    zeros: Codes | None = None

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All that there is, in the order of the fields."""
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)


def scale_type(fmt: WeightType) -> np.dtype[np.float32] | np.dtype[np.float16]:
    """Of the scales, and of every other number of a graph with this format."""
    return np.dtype(np.float32) if fmt.item_bytes == 4 else np.dtype(np.float16)


def quantize(weight: Floats, fmt: WeightType, importance: Floats | None = None) -> Quantized:
    """Codes, scales and zero points that nearly minimise ``sum(importance * (weight - dequantized)^2)`` of every block.

    Candidates differ in where a block's extreme weights fall; each one's scale is refitted by least squares to its own
    codes, the best is rounded and fitted once more. Working memory: about six copies of ``weight``; give few rows.

    Args:
        weight: (rows, columns) float32. importance: (columns,) non-negative float32, ``None`` for equal weights.
    """
    bits = fmt.code_bits
    blocks = _blocks(weight, fmt.block)
    weights = None if importance is None else _column_weights(importance, fmt.block)
    best_gain, scale = (np.zeros(blocks.shape[:2], np.float32) for _ in range(2))
    middle = np.float32(2 ** (bits - 1))
    zero = np.full(blocks.shape[:2], middle)
    candidates = _asymmetric(blocks, bits) if fmt.zero_point_bits else _symmetric(blocks, bits)
    for inverse, zeros in candidates:
        gain, fitted = _fit(blocks, _round(blocks, inverse, zeros, bits), weights)
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(scale, fitted, where=better)
        np.copyto(zero, zeros, where=better)
    codes = _round(blocks, _reciprocal(scale), zero, bits)
    _, scale = _fit(blocks, codes, weights)
    codes += zero[..., None]
    packed = pack_codes(codes, bits)
    zeros_packed = pack_codes(_padded(zero, 8 // bits)[:, None], bits)[:, 0] if fmt.zero_point_bits else None
    if fmt.item_bytes == 4:
        return Quantized(packed, scale, zeros_packed)
    most = np.finfo(np.float16).max
    return Quantized(packed, np.clip(scale, -most, most).astype(np.float16), zeros_packed)


def dequantize(quantized: Quantized, fmt: WeightType, columns: int) -> Floats:
    """The (rows, columns) float32 matrix that the runtime multiplies with."""
    rows, blocks = quantized.scales.shape
    signed = codes_of(quantized, fmt).reshape(rows, blocks, fmt.block) - zero_points(quantized, fmt)[..., None]
    weight: Floats = (signed * quantized.scales[..., None].astype(np.float32)).reshape(rows, -1)[:, :columns]
    return weight


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Put rows together again."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Quantized(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


def codes_of(quantized: Quantized, fmt: WeightType) -> Floats:
    """Unpack the codes: (rows, blocks * block), from 0."""
    return _unpack(quantized.codes.reshape(len(quantized.scales), -1), fmt.code_bits)


def zero_points(quantized: Quantized, fmt: WeightType) -> Floats:
    """Unpack the zero points, (rows, blocks)."""
    bits = fmt.code_bits
    if quantized.zeros is None:
        return np.full(quantized.scales.shape, 2 ** (bits - 1), np.float32)
    return _unpack(quantized.zeros, bits)[:, : quantized.scales.shape[1]]


def _symmetric(blocks: Floats, bits: int) -> Iterator[tuple[Floats, np.float32]]:
    """Reciprocal scales that put a block's largest weight at different codes, and the zero point."""
    middle = np.float32(2 ** (bits - 1))
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    inverse = _reciprocal(largest) * middle
    for target in _TARGETS[bits]:
        yield inverse * np.float32(target), middle


def _asymmetric(blocks: Floats, bits: int) -> Iterator[tuple[Floats, Floats]]:
    """Reciprocal scales and zero points that put different shares of a block's range between the first and last code.

    Zero is a code of every block: a zero point is one.
    """
    last = np.float32(2**bits - 1)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    for down, up in _ENDS[bits]:
        first, end = low * np.float32(down), high * np.float32(up)
        inverse = _reciprocal(end - first) * last
        yield inverse, np.clip(np.rint(-first * inverse), 0, last)


def _blocks(weight: Floats, block: int) -> Floats:
    return _padded(weight, block).reshape(len(weight), -1, block)


def _column_weights(importance: Floats, block: int) -> Floats:
    """(1, blocks, block) with maximum 1."""
    positive = np.maximum(importance, 0)
    positive = positive + _IMPORTANCE_FLOOR * positive.mean() + _TINY
    return _blocks((positive / positive.max())[None], block)


def _reciprocal(values: Floats) -> Floats:
    """1 / values, and 0 where that overflows: a block of zeros, or of denormals, which becomes zeros."""
    safe: Floats = np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > _TINY)
    return safe


def _round(blocks: Floats, inverse: Floats, zero: Floats | np.float32, bits: int) -> Floats:
    """Codes less their zero point."""
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    low = -np.asarray(zero)[..., None]
    return np.clip(codes, low, low + np.float32(2**bits - 1), out=codes)


def _fit(blocks: Floats, codes: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """Error removed by the least-squares scale of ``codes``, and that scale; (rows, blocks) each."""
    weighted = codes if weights is None else codes * weights
    cross: Floats = np.einsum("rbk,rbk->rb", weighted, blocks)
    square: Floats = np.einsum("rbk,rbk->rb", weighted, codes)
    scale: Floats = np.divide(cross, square, out=np.zeros_like(cross), where=square > 0)
    return cross * scale, scale


def pack_codes(codes: Floats, bits: int) -> Codes:
    """(rows, blocks, numbers) to (rows, blocks, bytes), the first number in the lowest bits."""
    lanes = 8 // bits
    unsigned = codes.astype(np.uint8).reshape(*codes.shape[:2], -1, lanes)
    packed = unsigned[..., 0].copy()
    for lane in range(1, lanes):
        packed |= unsigned[..., lane] << np.uint8(lane * bits)
    return packed


def _unpack(packed: Codes, bits: int) -> Floats:
    """(rows, bytes) to (rows, numbers)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(len(packed), -1).astype(np.float32)


def _padded(rows: Floats, multiple: int) -> Floats:
    missing = -rows.shape[1] % multiple
    return np.pad(rows, ((0, 0), (0, missing))) if missing else rows
