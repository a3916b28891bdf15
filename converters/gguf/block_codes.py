"""Where ggml's block types keep scales and codes: read as the grid that a matrix is rounded to, and written back.

The layouts are those of ggml's ``ggml-common.h`` and ``dequantize_row_*``. Scales are never changed here: codes are put
into blocks that have been quantized before. Tests dequantize with ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from acip_export.rounding.error_feedback import Codes, Floats, Grid
from acip_export.weight_types import weight_type
from converters.gguf import two_bits

Bytes = npt.NDArray[np.uint8]

_FOUR, _LOW = np.uint8(4), np.uint8(15)
# ggml's kvalues_iq4nl.
_IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True)
class BlockCodes:
    """How the blocks of one type are read and written.

    Attributes:
        group: weights that share a scale. lowest, highest: of the codes; those in the blocks count from 0.
        scales: of blocks (n, bytes): scales, and offsets or ``None``, (n, groups) each.
        pack: puts codes (n, weights), counted from 0, into blocks.
        levels: what a code stands for, unless for itself.
    """

    group: int
    lowest: int
    highest: int
    scales: Callable[[Bytes], tuple[Floats, Floats | None]]
    pack: Callable[[Bytes, Bytes], None]
    levels: Floats | None = None

    def grid(self, blocks: Bytes, rows: int) -> Grid:
        """Return what the weights of a matrix of ``rows`` rows may become."""
        steps, offsets = self.scales(blocks)
        return Grid(
            steps.reshape(rows, -1),
            self.group,
            self.lowest,
            self.highest,
            None if offsets is None else offsets.reshape(rows, -1),
            self.levels,
        )

    def put(self, blocks: Bytes, codes: Codes) -> None:
        """Write the codes of a matrix into its blocks."""
        shifted = (codes.astype(np.int16) - self.lowest).astype(np.uint8)
        self.pack(blocks, shifted.reshape(len(blocks), -1))


# Where the float16 that all of a block is multiplied with stand: its scale, and that of its minima.
SCALE_PLACES: dict[str, tuple[int, ...]] = {
    "q8_0": (0,),
    "q6_k": (208,),
    "q5_k": (0, 2),
    "q5_1": (0, 2),
    "q5_0": (0,),
    "q4_k": (0, 2),
    "q4_1": (0, 2),
    "q4_0": (0,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "q2_0": (0,),
    "q3_k": (108,),
    "q2_k": (80, 82),
    "iq3_s": (0,),
    "iq3_xxs": (0,),
    "iq2_s": (0,),
    "iq2_xs": (0,),
    "iq2_xxs": (0,),
    "iq1_s": (0,),
}


def multiply_scales(data: Bytes, name: str, gains: Floats) -> None:
    """Multiply the blocks of a matrix by ``gains``, as many as there are blocks; what comes out is float16."""
    blocks = blocks_of(data, name)
    for place in SCALE_PLACES[name]:
        scaled = _half(blocks, place) * gains.reshape(-1, 1)
        blocks[:, place : place + 2] = scaled.astype(np.float16).view(np.uint8)


def blocks_of(data: Bytes, name: str) -> Bytes:
    """Return the bytes of a matrix as its blocks, (n, bytes of a block)."""
    return data.reshape(-1, weight_type("gguf", name).block_bytes)


def _half(blocks: Bytes, place: int) -> Floats:
    """Return the float16 at ``place`` of every block, (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16).astype(np.float32)


def _one_scale(blocks: Bytes) -> tuple[Floats, None]:
    return _half(blocks, 0), None


def _scale_and_offset(blocks: Bytes) -> tuple[Floats, Floats]:
    return _half(blocks, 0), _half(blocks, 2)


def _nibbles(codes: Bytes, width: int) -> Bytes:
    """Pack four bits of ``2 * width`` codes at a time: the first ``width`` are the low halves of as many bytes."""
    pairs = codes.reshape(len(codes), -1, 2, width)
    packed: Bytes = (pairs[:, :, 0] & _LOW) | (pairs[:, :, 1] << _FOUR)
    return packed.reshape(len(codes), -1)


def _quarters(codes: Bytes) -> Bytes:
    """Pack two bits of 128 codes at a time: 32 bytes, the first 32 codes lowest."""
    fours = codes.reshape(len(codes), -1, 4, 32) & np.uint8(3)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(fours << shifts, axis=2)
    return packed.reshape(len(codes), -1)


def _bit_planes(bits: Bytes) -> Bytes:
    """Pack one bit of 256 codes: 32 bytes, bit ``i`` of byte ``j`` is of the code ``32 * i + j``."""
    planes: Bytes = np.packbits(bits.reshape(len(bits), 8, 32), axis=1, bitorder="little").reshape(len(bits), 32)
    return planes


def _pack_q8_0(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = codes - np.uint8(127)  # modulo 256: a signed byte


def _pack_nibbles(start: int) -> Callable[[Bytes, Bytes], None]:
    def pack(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, start:] = _nibbles(codes, 16)

    return pack


def _pack_five_bits(start: int) -> Callable[[Bytes, Bytes], None]:
    def pack(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, start : start + 4] = np.packbits(codes >> _FOUR, axis=1, bitorder="little")
        blocks[:, start + 4 :] = _nibbles(codes, 16)

    return pack


def _pack_q2_0(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = two_bits.pack(codes)


# K-quants: blocks of 256 whose scales, and minima, are products of a float16 and a few bits.


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Return the eight scales and eight minima of six bits in the twelve bytes of q4_k and q5_k."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minima


def _scales_k4(blocks: Bytes) -> tuple[Floats, Floats]:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0) * scales.astype(np.float32), -(_half(blocks, 2) * minima.astype(np.float32))


def _pack_q4_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:] = _nibbles(codes, 32)


def _pack_q5_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:48] = _bit_planes(codes >> _FOUR)
    blocks[:, 48:] = _nibbles(codes, 32)


def _scales_q6_k(blocks: Bytes) -> tuple[Floats, None]:
    signed = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _half(blocks, 208) * signed, None


def _pack_q6_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, :128] = _nibbles(codes, 64)
    blocks[:, 128:192] = _quarters(codes >> _FOUR)


def _scales_q3_k(blocks: Bytes) -> tuple[Floats, None]:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    four = np.concatenate([low & 15, low >> 4], axis=1)
    two = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    signed = (four | (two << 4)).astype(np.float32) - np.float32(32)
    return _half(blocks, 108) * signed, None


def _pack_q3_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, :32] = _bit_planes(codes >> np.uint8(2))
    blocks[:, 32:96] = _quarters(codes)


def _scales_q2_k(blocks: Bytes) -> tuple[Floats, Floats]:
    packed = blocks[:, :16]
    scales, minima = (packed & 15).astype(np.float32), (packed >> 4).astype(np.float32)
    return _half(blocks, 80) * scales, -(_half(blocks, 82) * minima)


def _pack_q2_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:80] = _quarters(codes)


def _scales_iq4_xs(blocks: Bytes) -> tuple[Floats, None]:
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(len(blocks), 8)
    pairs = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16)
    high = ((pairs >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    signed = (low | (high << 4)).astype(np.float32) - np.float32(32)
    return _half(blocks, 0) * signed, None


BLOCK_CODES: dict[str, BlockCodes] = {
    "q8_0": BlockCodes(32, -127, 127, _one_scale, _pack_q8_0),
    "q6_k": BlockCodes(16, -32, 31, _scales_q6_k, _pack_q6_k),
    "q5_k": BlockCodes(32, 0, 31, _scales_k4, _pack_q5_k),
    "q5_1": BlockCodes(32, 0, 31, _scale_and_offset, _pack_five_bits(4)),
    "q5_0": BlockCodes(32, -16, 15, _one_scale, _pack_five_bits(2)),
    "q4_k": BlockCodes(32, 0, 15, _scales_k4, _pack_q4_k),
    "q4_1": BlockCodes(32, 0, 15, _scale_and_offset, _pack_nibbles(4)),
    "q4_0": BlockCodes(32, -8, 7, _one_scale, _pack_nibbles(2)),
    "iq4_nl": BlockCodes(32, 0, 15, _one_scale, _pack_nibbles(2), _IQ4_LEVELS),
    "iq4_xs": BlockCodes(32, 0, 15, _scales_iq4_xs, _pack_nibbles(8), _IQ4_LEVELS),
    "q3_k": BlockCodes(16, -4, 3, _scales_q3_k, _pack_q3_k),
    "q2_k": BlockCodes(16, 0, 3, _scales_q2_k, _pack_q2_k),
    "q2_0": BlockCodes(two_bits.BLOCK, two_bits.LOWEST, two_bits.HIGHEST, _one_scale, _pack_q2_0),
}
