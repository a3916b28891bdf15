"""Choose the codes of a quantized matrix again, each error carried to the columns that are still to be rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from acip_export.rounding.error_feedback import FeedbackFactor, Grid, round_with_feedback
from acip_export.weight_types import WeightType
from converters.onnx.quantize import Floats, Quantized, codes_of, pack_codes, zero_points


def with_feedback(
    quantized: Quantized,
    weight: Floats,
    fmt: WeightType,
    factor: FeedbackFactor,
    row_factor: FeedbackFactor | None = None,
) -> Quantized:
    """Return ``quantized`` with codes that keep the product with the layer's inputs, and its scales and zero points.

    Args:
        weight: (rows, columns) float32. factor, row_factor: of the second moments of inputs, and of output gradients.

    Raises:
        UnsupportedError: as :func:`acip_export.rounding.error_feedback.round_with_feedback`.
    """
    rows, columns = weight.shape
    middle = 2 ** (fmt.code_bits - 1)
    scales = quantized.scales.astype(np.float32)
    # Counted from the middle code, so that all fit eight bits with a sign.
    moved = None
    if quantized.zeros is not None:
        moved = scales * (np.float32(middle) - zero_points(quantized, fmt))
    grid = Grid(scales, fmt.block, -middle, middle - 1, moved)
    chosen = round_with_feedback(weight, grid, factor, row_factor)
    codes = codes_of(quantized, fmt)
    codes[:, :columns] = chosen.astype(np.float32) + np.float32(middle)
    return replace(quantized, codes=pack_codes(codes.reshape(rows, -1, fmt.block), fmt.code_bits))
