"""What GGUF exports make of a matrix: ggml's rounding, with the errors carried forward where the inputs are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from acip_export.error_feedback import round_with_feedback
from acip_export.errors import UnsupportedError
from converters.gguf import ggml_library as ggml
from converters.gguf.block_codes import BLOCK_CODES, blocks_of

if TYPE_CHECKING:
    import torch

    from acip_export.rounding import InputMoments


def quantize(weight: torch.Tensor, name: str, inputs: InputMoments | None = None) -> ggml.Bytes:
    """Return the bytes of ``weight`` (rows, columns) in the type ``name``.

    Scales are ggml's, searched with the importance of the inputs; with a factor, and in a type whose codes are known
    here, the codes are chosen again with error feedback.

    Raises:
        UnsupportedError, MissingExtraError: as :func:`converters.gguf.ggml_library.quantize`.
    """
    data = ggml.quantize(weight, name, None if inputs is None else inputs.importance)
    known = BLOCK_CODES.get(name)
    if inputs is None or inputs.feedback is None or known is None:
        return data
    matrix = np.ascontiguousarray(weight.detach().float().reshape(-1, weight.shape[-1]).numpy())
    if inputs.feedback.size != matrix.shape[1]:
        raise UnsupportedError(
            f"error feedback for {inputs.feedback.size} inputs cannot round rows of {matrix.shape[1]} weights: "
            "it is of another matrix"
        )
    blocks = blocks_of(data, name)
    grid = known.grid(blocks, len(matrix))
    known.put(blocks, round_with_feedback(matrix, grid, inputs.feedback, ggml.processors()))
    return data


def round_trip(weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
    """See :class:`acip_export.rounding.RoundTrip`."""
    import torch

    return torch.from_numpy(ggml.dequantize(quantize(weight, name, inputs), tuple(weight.shape), name))
