"""``--split-max-size`` in planning: a tensor lies in one file, so none may be larger than a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UsageError
from acip_export.formats.targets import split_max_size
from acip_export.planning.candidates import Candidates
from acip_export.weight_types import weight_type

# Of a part with one tensor: keys, provenance, the tensor's entry and padding. A test compares with the writer's.
PART_HEAD = 576


def fitting(candidates: Sequence[Candidates], target: str, options: Mapping[str, str]) -> tuple[Candidates, ...]:
    """The candidates without those that no file of ``--split-max-size`` can hold.

    Raises:
        UsageError: nothing is left of a tensor.
    """
    largest = split_max_size(options)
    if largest is None:
        return tuple(candidates)
    found = []
    for candidate in candidates:
        left = candidate.only(lambda _, option: fits_a_file(_largest(option, target), options))
        if not left.options:
            least = min(_largest(option, target) for option in candidate.options)
            raise UsageError(
                f"--split-max-size {largest}B is too small: {candidate.name} takes at least {least} bytes; "
                f"give at least  {least + PART_HEAD}B"
            )
        found.append(left)
    return tuple(found)


def fits_a_file(nbytes: int, options: Mapping[str, str]) -> bool:
    """Whether a file of ``--split-max-size`` holds a tensor of so many bytes."""
    largest = split_max_size(options)
    return largest is None or nbytes + PART_HEAD <= largest


def _largest(option: TensorDecision, target: str) -> int:
    """Bytes of the largest tensor that an option puts into the model's files: an adapter has a file of its own."""
    rows, columns = option.shape if len(option.shape) == 2 else (1, option.shape[0])
    parts = [(rows, columns, option.type)]
    if option.representation == "factored":
        parts = [(option.rank or 0, columns, option.down_type), (rows, option.rank or 0, option.up_type)]
    return max(weight_type(target, form or "").nbytes(*size) for *size, form in parts)


def split_notes(files: Mapping[str, int], options: Mapping[str, str]) -> tuple[str, ...]:
    """What does not keep to the size."""
    largest = split_max_size(options)
    return tuple(
        f"{name} has {size:,} bytes, more than --split-max-size: llama.cpp opens an adapter from one file only"
        for name, size in files.items()
        if largest is not None and size > largest
    )
