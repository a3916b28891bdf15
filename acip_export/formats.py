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

Target = Literal["gguf", "onnx"]


@dataclass(frozen=True)
class WeightFormat:
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
    """

    name: str
    target: Target
    block: int
    block_bytes: int
    relative_mse: float
    pads_rows: bool = False
    needs_importance: bool = False
    item_bytes: int = 4

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def is_float(self) -> bool:
        return self.block == 1

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
        return rows * -(-columns // self.block) * self.block_bytes


def _ggml(name: str, block: int, block_bytes: int, relative_mse: float, needs_importance: bool = False) -> WeightFormat:
    return WeightFormat(name, "gguf", block, block_bytes, relative_mse, needs_importance=needs_importance)


def _nbits(name: str, bits: int, block: int, relative_mse: float, item_bytes: int = 4) -> WeightFormat:
    """Symmetric MatMulNBits with one scale a block, float32 or float16: kb * (block * bits / 8 + item_bytes) a row."""
    block_bytes = block * bits // 8 + item_bytes
    return WeightFormat(name, "onnx", block, block_bytes, relative_mse, pads_rows=True, item_bytes=item_bytes)


_TABLE: tuple[WeightFormat, ...] = (
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
    WeightFormat("f32", "onnx", 1, 4, 0.0),
    _nbits("int8", 8, 32, 2.5e-5),
    _nbits("int8-b128", 8, 128, 3.9e-5),
    _nbits("int4", 4, 32, 6.6e-3),
    _nbits("int4-b64", 4, 64, 8.1e-3),
    _nbits("int4-b128", 4, 128, 9.4e-3),
    _nbits("int2", 2, 32, 0.112),
    WeightFormat("f16", "onnx", 1, 2, 4.32e-8, item_bytes=2),
    _nbits("int8-f16", 8, 32, 2.5e-5, 2),
    _nbits("int8-b128-f16", 8, 128, 3.9e-5, 2),
    _nbits("int4-f16", 4, 32, 6.6e-3, 2),
    _nbits("int4-b64-f16", 4, 64, 8.1e-3, 2),
    _nbits("int4-b128-f16", 4, 128, 9.4e-3, 2),
)

_BY_NAME: dict[tuple[str, str], WeightFormat] = {(f.target, f.name): f for f in _TABLE}


def weight_format(target: str, name: str) -> WeightFormat:
    """Look a format up.

    Raises:
        KeyError: the target has no such format.
    """
    return _BY_NAME[target, name]


def formats_of(target: str) -> tuple[WeightFormat, ...]:
    """All formats of a target, most precise first."""
    return tuple(f for f in _TABLE if f.target == target)
