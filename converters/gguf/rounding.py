"""What GGUF exports make of a matrix: ggml's rounding, with the errors carried forward where the inputs are known."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from acip_export.rounding.error_feedback import round_with_feedback, rows_at_once
from acip_export.weight_types import weight_type
from converters.gguf import ggml_library as ggml
from converters.gguf.block_codes import BLOCK_CODES, BlockCodes, blocks_of, multiply_scales

if TYPE_CHECKING:
    import torch

    from acip_export.rounding.error_feedback import FeedbackFactor
    from acip_export.rounding.quantizer import InputMoments


def quantize(weight: torch.Tensor, name: str, inputs: InputMoments | None = None) -> ggml.Bytes:
    """Return the bytes of ``weight`` (rows, columns) in the type ``name``.

    Scales are searched with the importance of the inputs, by ggml (of q2_0 by us); with a factor, and in a type whose
    codes are known here, the codes are chosen again with error feedback. What tuning found multiplies the scales at
    last.

    Raises:
        UnsupportedError: as :func:`acip_export.rounding.error_feedback.round_with_feedback`.
        UnsupportedError, MissingExtraError: as :func:`converters.gguf.ggml_library.quantize`.
    """
    data = _rounded(weight, name, inputs)
    if inputs is not None and inputs.gains is not None:
        multiply_scales(data, name, inputs.gains.float().numpy())
    return data


def _rounded(weight: torch.Tensor, name: str, inputs: InputMoments | None) -> ggml.Bytes:
    known = BLOCK_CODES.get(name)
    importance = None if inputs is None else inputs.importance
    if inputs is None:
        return ggml.quantize(weight, name, importance)
    matrix, feedback, kept = weight.detach().reshape(-1, weight.shape[-1]), inputs.feedback, inputs.kept
    if feedback is None or known is None:
        nearest = partial(ggml.quantize, weight, name, importance)
        if kept is None or weight_type("gguf", name).is_float:
            return nearest()
        (data,) = kept.arrays(matrix, name, importance, None, lambda: (nearest(),))
        return data
    data = np.empty(weight_type("gguf", name).nbytes(*matrix.shape), np.uint8)
    end = 0
    for some, rows in rows_at_once(matrix, inputs.row_feedback):
        compute = partial(_with_feedback, some, name, importance, feedback, known, rows)
        (rounded,) = compute() if kept is None else kept.arrays(some, name, importance, feedback, compute, rows)
        data[end : end + rounded.nbytes] = rounded
        end += rounded.nbytes
    return data


def _with_feedback(
    weight: torch.Tensor,
    name: str,
    importance: torch.Tensor | None,
    feedback: FeedbackFactor,
    known: BlockCodes,
    rows: FeedbackFactor | None,
) -> tuple[ggml.Bytes]:
    data = ggml.quantize(weight, name, importance)
    blocks = blocks_of(data, name)
    matrix = np.ascontiguousarray(weight.float().numpy())
    known.put(blocks, round_with_feedback(matrix, known.grid(blocks, len(matrix)), feedback, rows))
    return (data,)


def round_trip(weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
    """See :class:`acip_export.rounding.quantizer.RoundTrip`."""
    import torch

    return torch.from_numpy(ggml.dequantize(quantize(weight, name, inputs), tuple(weight.shape), name))
