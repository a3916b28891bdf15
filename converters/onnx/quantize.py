"""Symmetric block quantization as ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` read it.

A row of K weights is cut into ``ceil(K / block)`` blocks. A block holds unsigned codes of ``bits`` bits, lowest first
in each byte, and one float32 scale: ``w = (code - 2^(bits-1)) * scale``. Scales may be negative: the block's largest
weight then takes the code of larger magnitude, as in ggml's q4_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acip_export.formats import WeightFormat

_SCALE_BYTES = 4
# Signed codes that the largest weight of a block is tried at, as multiples of 2^(bits-1). Clipping the tail pays where
# codes are few; 8 bits have so many that only the two ends matter. Found by widening until the error stopped falling.
_TARGETS: dict[int, tuple[float, ...]] = {
    8: (-1.0, 0.992),
    4: (-1.25, -1.12, -1.04, -0.96, -0.88, -0.82, 0.9),
    2: (-1.3, -1.1, -0.95, -0.8, -0.68, 0.55, 0.7),
}
# A column that the calibration text never excited still counts a little.
_IMPORTANCE_FLOOR = 1e-3


@dataclass(frozen=True)
class Quantized:
    """Rows of a quantized matrix.

    Attributes:
        codes: (rows, blocks, block * bits / 8) uint8. scales: (rows, blocks) float32.
    """

    codes: Tensor
    scales: Tensor


def bits_of(fmt: WeightFormat) -> int:
    """Bits of one code of a quantized ONNX format."""
    return (fmt.block_bytes - _SCALE_BYTES) * 8 // fmt.block


def quantize(weight: Tensor, fmt: WeightFormat, importance: Tensor | None = None) -> Quantized:
    """Codes and scales that nearly minimise ``sum(importance * (weight - dequantized)^2)`` in every block.

    Scale candidates put the block's largest weight at different codes; each is refitted by least squares to its own
    codes, the best is rounded and fitted once more. Working memory: about eight copies of ``weight``; give few rows.

    Args:
        weight: (rows, columns), any float dtype. importance: (columns,) non-negative, ``None`` for equal weights.
    """
    bits = bits_of(fmt)
    blocks = _blocks(weight.float(), fmt.block)
    weights = _column_weights(importance, weight.shape[1], fmt.block)
    largest = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
    inverse = torch.where(largest == 0, torch.zeros_like(largest), 2 ** (bits - 1) / largest)

    best_gain = torch.zeros_like(largest)
    scale = torch.zeros_like(largest)
    for target in _TARGETS[bits]:
        gain, fitted = _fit(blocks, _round(blocks, inverse * target, bits), weights)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        scale = torch.where(better, fitted, scale)
    codes = _round(blocks, torch.where(scale == 0, scale, 1 / scale), bits)
    _, refitted = _fit(blocks, codes, weights)
    return Quantized(_pack(codes, bits), refitted.squeeze(2))


def dequantize(quantized: Quantized, fmt: WeightFormat, columns: int) -> Tensor:
    """The (rows, columns) float32 matrix that the runtime multiplies with."""
    bits = bits_of(fmt)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (quantized.codes[..., None] >> shifts) & (2**bits - 1)
    signed = codes.flatten(2).float() - 2 ** (bits - 1)
    weight: Tensor = (signed * quantized.scales[..., None]).flatten(1)[:, :columns]
    return weight


def _blocks(weight: Tensor, block: int) -> Tensor:
    rows, columns = weight.shape
    padding = -columns % block
    return torch.nn.functional.pad(weight, (0, padding)).view(rows, -1, block)


def _column_weights(importance: Tensor | None, columns: int, block: int) -> Tensor:
    if importance is None:
        return torch.ones(1)
    importance = importance.float().clamp_min(0)
    importance = importance + _IMPORTANCE_FLOOR * importance.mean() + torch.finfo(torch.float32).tiny
    return _blocks((importance / importance.max())[None, :columns], block)


def _round(blocks: Tensor, inverse: Tensor, bits: int) -> Tensor:
    return (blocks * inverse).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _fit(blocks: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Error removed by the least-squares scale of ``codes``, and that scale; (rows, blocks, 1) each."""
    weighted = codes * weights
    cross = (weighted * blocks).sum(2, keepdim=True)
    square = (weighted * codes).sum(2, keepdim=True)
    scale = torch.where(square == 0, square, cross / square)
    return cross * scale, scale


def _pack(codes: Tensor, bits: int) -> Tensor:
    unsigned = (codes + 2 ** (bits - 1)).to(torch.uint8)
    lanes = unsigned.unflatten(2, (-1, 8 // bits))
    packed: Tensor = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (lane * bits)
    return packed
