"""Rounded matrices, kept in files for as long as one export is written and verified.

An export and the reference that it is compared with are rounded by the same code from the same numbers. Error feedback
takes longer than everything else there, so what the one has rounded the other reads. Files are named by everything that
the rounding depends on: a matrix that is written in another order than the bundle has it is rounded twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from acip_export.errors import OutputError

if TYPE_CHECKING:
    import torch

    from acip_export.error_feedback import FeedbackFactor

Arrays = Sequence[npt.NDArray[Any]]

# Rows whose float32 copy is hashed at once.
_ROWS = 512


@dataclass(frozen=True)
class KeptRoundings:
    """Read and fill an existing directory."""

    directory: Path

    def arrays(
        self,
        weight: torch.Tensor,
        type: str,
        importance: torch.Tensor | None,
        feedback: FeedbackFactor,
        compute: Callable[[], Arrays],
    ) -> Arrays:
        """Return what ``compute`` makes of a matrix, computed for the first to ask.

        Args:
            weight, type, importance, feedback: all that the result depends on.

        Raises:
            OutputError: the disk is full.
        """
        file = self.directory / f"{_key(weight, type, importance, feedback)}.npz"
        if not file.is_file():
            arrays = compute()
            try:
                np.savez(file, *arrays)
            except OSError as reason:
                raise OutputError(f"{self.directory} has no room for rounded matrices: {reason.strerror}") from reason
            return arrays
        with np.load(file) as stored:
            return [stored[name] for name in stored.files]


def _key(weight: torch.Tensor, type: str, importance: torch.Tensor | None, feedback: FeedbackFactor) -> str:
    digest = hashlib.blake2b(f"{type} {tuple(weight.shape)} {importance is None}".encode(), digest_size=20)
    for start in range(0, len(weight), _ROWS):
        digest.update(weight[start : start + _ROWS].float().contiguous().numpy().data)
    if importance is not None:
        digest.update(importance.contiguous().numpy().data)
    for array in (feedback.order, feedback.codes, feedback.steps):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
