"""The ways to rank: one file each, and the registry that finds them.

A file of this folder holds one :class:`Algorithm` as ``ALGORITHM``; the command line, the documentation and
:func:`acip_export.ranking.rank_model` know it from there. Its module is imported for every command, so it imports
nothing heavy: torch and what measures with it are imported inside ``score``.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from acip_export.choices import instead_of
from acip_export.errors import UsageError
from acip_export.ranking.algorithm import Algorithm


def algorithms() -> dict[str, Algorithm]:
    """Return all algorithms by name, in the order of their files."""
    known: list[Algorithm] = [import_module(f"{__name__}.{file.name}").ALGORITHM for file in iter_modules(__path__)]
    return {algorithm.name: algorithm for algorithm in known}


def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm called ``name``.

    Raises:
        UsageError: there is none.
    """
    known = algorithms()
    if name not in known:
        raise UsageError(f"unknown ranking algorithm {name!r}; {instead_of(name, known, 'known')}")
    return known[name]


def learned_algorithms() -> str:
    """Return the names of the algorithms that learn, for messages."""
    return " or ".join(name for name, algorithm in algorithms().items() if algorithm.learns)
