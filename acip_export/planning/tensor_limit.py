"""Leave out candidates that no file can hold, where the user limits the size of files."""

from __future__ import annotations

from collections.abc import Sequence

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UsageError
from acip_export.formats.protocol import ExportFormat
from acip_export.planning.candidates import Candidates
from acip_export.planning.space import SearchSpace


def fitting(candidates: Sequence[Candidates], space: SearchSpace) -> tuple[Candidates, ...]:
    """Return the candidates that a file of the user's choosing can hold.

    Raises:
        UsageError: nothing is left of a tensor.
    """
    limit = space.format.tensor_limit(space.options)
    if limit is None:
        return tuple(candidates)
    kept = []
    for candidate in candidates:
        left = candidate.only(lambda _, option: _largest(option, space.format) <= limit.nbytes)
        if not left.options:
            least = min(_largest(option, space.format) for option in candidate.options)
            raise UsageError(limit.too_small(candidate.name, least))
        kept.append(left)
    return tuple(kept)


def _largest(option: TensorDecision, format: ExportFormat) -> int:
    """Return the bytes of the largest tensor that an option puts into the model's files: a LoRA has its own file."""
    rows, columns = option.shape if len(option.shape) == 2 else (1, option.shape[0])
    parts = [(rows, columns, option.type)]
    if option.representation == "factored":
        parts = [(option.rank or 0, columns, option.down_type), (rows, option.rank or 0, option.up_type)]
    return max(format.type(name or "").nbytes(*size) for *size, name in parts)
