"""What a format's quantizer makes of a weight. Rounding belongs to the converters; the stages below them are handed it.

One function serves everybody who has to know the rounded numbers (the planner's error tables, the refit of factors, the
reference that exports are compared with), and it is the very code that writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class RoundTrip(Protocol):
    """Quantize and dequantize, as an export stores a matrix and its runtime reads it."""

    def __call__(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        """float32 of the shape of ``weight`` (rows, columns), rows independent of each other.

        Args:
            name: a type of the format.
            importance: (columns,) weights of the squared rounding error, or ``None``.

        Raises:
            UnsupportedError: the rows do not fit the format, or it needs an importance that is missing.
            MissingExtraError: the quantizer is not installed.
        """
        ...
