"""The one table of weight formats: block sizes, bytes, constraints and expected rounding error.

Planner, converters and tests take sizes from here and nowhere else.

Sources: ggml block layouts (ggml-common.h; the ``gguf`` package's ``GGML_QUANT_SIZES`` is compared with this table in a
test) and onnxruntime's ``com.microsoft.MatMulNBits``.

``relative_mse`` is E[(w - dequantize(quantize(w)))^2] / E[w^2] on Gaussian weights; ``benchmarks/format_errors.py``
measures it and a test compares. ggml's types are measured with uniform importance, since every ranked layer is
quantized with importance; without any, as for embeddings, the error is up to a quarter larger (two thirds for 1 bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from acip_export.units import ceil_div

Target = Literal["gguf", "onnx"]


@dataclass(frozen=True)
class WeightType:
    """How the rows of a weight matrix are stored.

    Attributes:
        name: as written in plans and on the command line.
        target: the file format that it belongs to.
        block: weights of one row that share a block (1 for floats).
        block_bytes: bytes of one block, scales and zero points included.
        pads_rows: rows are padded to whole blocks (ONNX); otherwise a row that is no multiple is refused (ggml).
        needs_importance: the quantizer refuses to work without importance weights.
        relative_mse: expected relative mean square rounding error.
        item_bytes: of one number of a graph that computes with it (ONNX): 4 or 2. Activations, cache and scales have
            the same precision, so all formats of a plan agree in it.
        zero_point_bits: of every block's zero point, packed row by row behind the scales (ONNX); 0: symmetric.
    """

    name: str
    format: Target
    block: int
    block_bytes: int
    relative_mse: float
    pads_rows: bool = False
    needs_importance: bool = False
    item_bytes: int = 4
    zero_point_bits: int = 0

    @property
    def bits_per_weight(self) -> float:
        return (8 * self.block_bytes + self.zero_point_bits) / self.block

    @property
    def is_float(self) -> bool:
        return self.block == 1

    @property
    def code_bits(self) -> int:
        """Bits of one code of a quantized ONNX format."""
        return (self.block_bytes - self.item_bytes) * 8 // self.block

    def fits(self, columns: int) -> bool:
        """Whether a row of ``columns`` weights can be stored at all."""
        return columns > 0 and (self.pads_rows or columns % self.block == 0)

    def nbytes(self, rows: int, columns: int) -> int:
        """Exact bytes of a ``rows`` x ``columns`` matrix.

        Raises:
            ValueError: the row does not fit the block (never silently widened).
        """
        if not self.fits(columns):
            raise ValueError(f"rows of {columns} weights do not fit {self.name} blocks of {self.block}")
        blocks = ceil_div(columns, self.block)
        return rows * (blocks * self.block_bytes + ceil_div(blocks * self.zero_point_bits, 8))


def _ggml(name: str, block: int, block_bytes: int, relative_mse: float, needs_importance: bool = False) -> WeightType:
    return WeightType(name, "gguf", block, block_bytes, relative_mse, needs_importance=needs_importance)


# Relative error of symmetric and asymmetric blocks of 16, 32, 64, 128 and 256 weights, by bits.
_NBITS_BLOCKS = (16, 32, 64, 128, 256)
_NBITS_ERRORS = {
    (8, False): (1.79e-5, 2.47e-5, 3.18e-5, 3.89e-5, 4.59e-5),
    (8, True): (1.56e-5, 2.16e-5, 2.79e-5, 3.44e-5, 4.09e-5),
    (4, False): (4.90e-3, 6.56e-3, 8.09e-3, 9.34e-3, 1.03e-2),
    (4, True): (4.43e-3, 6.03e-3, 7.62e-3, 9.03e-3, 1.02e-2),
    (2, False): (9.13e-2, 0.112, 0.127, 0.137, 0.144),
    (2, True): (9.07e-2, 0.110, 0.124, 0.134, 0.141),
}


def _nbits(item_bytes: int) -> tuple[WeightType, ...]:
    """MatMulNBits with a scale a block, float32 or float16: kb * (block * bits / 8 + item_bytes) bytes a row.

    ``int4`` is symmetric; ``uint4`` has zero points, another ceil(kb * bits / 8) bytes a row. Blocks are of 32 weights
    unless the name says otherwise.
    """
    made = []
    for (bits, asymmetric), errors in _NBITS_ERRORS.items():
        for block, relative_mse in zip(_NBITS_BLOCKS, errors, strict=True):
            name = f"{'u' * asymmetric}int{bits}" + (f"-b{block}" if block != 32 else "") + "-f16" * (item_bytes == 2)
            made.append(
                WeightType(
                    name,
                    "onnx",
                    block,
                    block * bits // 8 + item_bytes,
                    relative_mse,
                    pads_rows=True,
                    item_bytes=item_bytes,
                    zero_point_bits=bits * asymmetric,
                )
            )
    return tuple(made)


_TABLE: tuple[WeightType, ...] = (
    _ggml("f32", 1, 4, 0.0),
    _ggml("f16", 1, 2, 4.32e-8),
    _ggml("bf16", 1, 2, 2.77e-6),
    _ggml("q8_0", 32, 34, 2.86e-5),
    _ggml("q6_k", 256, 210, 2.98e-4),
    _ggml("q5_k", 256, 176, 1.25e-3),
    _ggml("q5_0", 32, 22, 1.63e-3),
    _ggml("q4_k", 256, 144, 5.00e-3),
    _ggml("q4_0", 32, 18, 6.66e-3),
    _ggml("iq4_nl", 32, 18, 5.58e-3),
    _ggml("iq4_xs", 256, 136, 5.68e-3),
    _ggml("q3_k", 256, 110, 2.08e-2),
    _ggml("iq3_s", 256, 110, 1.88e-2),
    _ggml("iq3_xxs", 256, 98, 3.31e-2),
    _ggml("q2_k", 256, 84, 7.22e-2),
    _ggml("iq2_s", 256, 82, 6.22e-2),
    _ggml("iq2_xs", 256, 74, 9.01e-2, needs_importance=True),
    _ggml("iq2_xxs", 256, 66, 0.118, needs_importance=True),
    _ggml("iq1_m", 256, 56, 0.203),
    _ggml("iq1_s", 256, 50, 0.235, needs_importance=True),
    _ggml("tq2_0", 256, 66, 0.647),
    _ggml("tq1_0", 256, 54, 0.647),
    _ggml("q1_0", 128, 18, 0.360),
    _ggml("mxfp4", 32, 17, 1.32e-2),
    WeightType("f32", "onnx", 1, 4, 0.0),
    *_nbits(4),
    WeightType("f16", "onnx", 1, 2, 4.32e-8, item_bytes=2),
    *_nbits(2),
)

_BY_NAME: dict[tuple[str, str], WeightType] = {(f.format, f.name): f for f in _TABLE}


def weight_type(target: str, name: str) -> WeightType:
    """Look a format up.

    Raises:
        KeyError: the target has no such format.
    """
    return _BY_NAME[target, name]


def types_of(target: str) -> tuple[WeightType, ...]:
    """All formats of a target, most precise first."""
    return tuple(f for f in _TABLE if f.format == target)
