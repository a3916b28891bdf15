"""``--split-max-size`` in planning: a tensor lies in one file, so none may be larger than a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from acip_export.artifacts.plan import TensorDecision
from acip_export.errors import UsageError
from acip_export.formats.targets import split_max_size
from acip_export.planning.candidates import Candidates
from acip_export.planning.space import SearchSpace
from acip_export.weight_types import weight_type

# Bytes of a part with one tensor around it: keys, provenance, its entry, padding. A test compares with the writer's.
PART_HEAD = 576


def fitting(candidates: Sequence[Candidates], space: SearchSpace) -> tuple[Candidates, ...]:
    """Return the candidates without those that no file of ``--split-max-size`` can hold.

    Raises:
        UsageError: nothing is left of a tensor.
    """
    most = split_max_size(space.options)
    if most is None:
        return tuple(candidates)

    def fits(_: Candidates, option: TensorDecision) -> bool:
        return fits_a_file(_largest_tensor(option, space.format.name), space.options)

    kept = []
    for candidate in candidates:
        sizes = [_largest_tensor(option, space.format.name) for option in candidate.options]
        if min(sizes) + PART_HEAD > most:
            raise UsageError(
                f"--split-max-size {most}B is too small: {candidate.name} takes at least {min(sizes)} bytes; "
                f"give at least  {min(sizes) + PART_HEAD}B"
            )
        kept.append(candidate.only(fits))
    return tuple(kept)


def fits_a_file(nbytes: int, options: Mapping[str, str]) -> bool:
    """Return whether a file of ``--split-max-size`` holds a tensor of so many bytes."""
    most = split_max_size(options)
    return most is None or nbytes + PART_HEAD <= most


def _largest_tensor(option: TensorDecision, format_: str) -> int:
    """Return the bytes of the largest tensor that an option puts into the model's files.

    An adapter does not count: it has a file of its own.
    """
    rows, columns = option.shape if len(option.shape) == 2 else (1, option.shape[0])
    parts = [(rows, columns, option.type)]
    if option.representation == "factored":
        parts = [(option.rank or 0, columns, option.down_type), (rows, option.rank or 0, option.up_type)]
    return max(weight_type(format_, name or "").nbytes(*size) for *size, name in parts)


def split_notes(files: Mapping[str, int], options: Mapping[str, str]) -> tuple[str, ...]:
    """Say which files do not keep to the size."""
    most = split_max_size(options)
    return tuple(
        f"{name} has {size:,} bytes, more than --split-max-size: llama.cpp opens an adapter from one file only"
        for name, size in files.items()
        if most is not None and size > most
    )
