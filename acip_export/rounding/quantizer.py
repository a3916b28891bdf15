"""Say what a format's quantizer is given and returns. Quantizers are the converters'; the stages below are handed them.

One function serves everybody who has to know the rounded numbers (the planner's error tables, the refit of factors, the
reference that exports are compared with), and it is the very code that writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from acip_export.version import made_by

if TYPE_CHECKING:
    import torch

    from acip_export.rounding.error_feedback import FeedbackFactor
    from acip_export.rounding.kept_roundings import KeptRoundings

# How codes are chosen once a block has its scale: each weight's nearest, or with the errors before it carried forward.
Rounding = Literal["nearest", "feedback"]
# Of the codes that error feedback chooses: measured rounding errors are good for one version.
FEEDBACK_VERSION = 6


@dataclass(frozen=True)
class InputMoments:
    """What a quantizer may know about the inputs that a matrix is multiplied with, and about what becomes of them.

    Attributes:
        importance: (columns,) second moments: weights of the squared rounding error; ``None``: all columns count alike.
        feedback: how errors are carried from column to column; ``None``: every weight goes to its nearest code.
        kept: where matrices that were rounded with error feedback are kept.
        gains: (rows, blocks) what tuning multiplies the scale of each block with once its codes are chosen.
        row_feedback: how errors are carried from row to row, too, at most ``ROWS_AT_ONCE`` rows in each; ``None``: rows
            are rounded independently of each other.
    """

    importance: torch.Tensor | None = None
    feedback: FeedbackFactor | None = None
    kept: KeptRoundings | None = None
    gains: torch.Tensor | None = None
    row_feedback: Sequence[FeedbackFactor] | None = None

    def of_rows(self, rows: torch.Tensor | slice) -> InputMoments:
        """Return the same for some rows of the matrix, in their order; they have to be independent."""
        assert self.row_feedback is None
        return self if self.gains is None else replace(self, gains=self.gains[rows])


class RoundTrip(Protocol):
    """Quantize and dequantize, as an export stores a matrix and its runtime reads it."""

    def __call__(self, weight: torch.Tensor, name: str, inputs: InputMoments | None) -> torch.Tensor:
        """float32 of the shape of ``weight`` (rows, columns), rows independent of each other without row feedback.

        Args:
            name: a type of the format.
            inputs: of the matrix; ``None``: nothing is known. A quantizer uses what it can.

        Raises:
            UnsupportedError: the rows do not fit the format, or it needs an importance that is missing.
            MissingExtraError: the quantizer is not installed.
        """
        ...


def origin_of(quantizers: Sequence[str], scores_sha256: str, plan: str = "") -> str:
    """Return all that roundings follow from.

    Args:
        quantizers: of the plans' formats, names and versions. plan: what tells it apart; empty: several share them.
    """
    origin = f"{made_by(*quantizers, f'feedback {FEEDBACK_VERSION}')}\nscores {scores_sha256}\n"
    return f"{origin}plan {plan}\n" if plan else origin
