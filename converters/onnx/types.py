"""The types that ONNX exports store matrices in: one row each, for graphs that compute in float32 and in float16.

Source: onnxruntime's ``com.microsoft.MatMulNBits``.
"""

from __future__ import annotations

from acip_export.weight_types import WeightType

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
                    # At accuracy level 4 (converters/onnx/converter.py); of 2 bits no such product is known.
                    input_block=block if bits > 2 else 0,
                )
            )
    return tuple(made)


# Most precise first.
NUMBERS: tuple[WeightType, ...] = (
    WeightType("f32", "onnx", 1, 4, 0.0),
    *_nbits(4),
    WeightType("f16", "onnx", 1, 2, 4.32e-8, item_bytes=2),
    *_nbits(2),
)
