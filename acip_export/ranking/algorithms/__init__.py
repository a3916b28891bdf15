"""The ways to rank: one file each, and the registry that finds them.

A file of this folder holds one :class:`Algorithm` as ``ALGORITHM``; the command line, the documentation and
:func:`acip_export.ranking.rank_model` know it from there. Its module is imported for every command, so it imports
nothing heavy: torch and what measures with it are imported inside ``score``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from acip_export.errors import UsageError
from acip_export.ranking.config import Basis

if TYPE_CHECKING:
    from acip_export.ranking.context import RankContext
    from acip_export.ranking.factorized_model import Factorized


@dataclass(frozen=True)
class Ranking:
    """Hold what an algorithm says about every component.

    Attributes:
        scores: (k,) by module, larger is more important.
        drop_losses: predicted loss of dropping each component, (k,) by module, in the unit of the model's task.
        settings: what the score file says about the algorithm beside its name and basis.
    """

    scores: Mapping[str, npt.NDArray[np.float32]]
    drop_losses: Mapping[str, npt.NDArray[np.float64]]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Algorithm:
    """Describe one way to rank the components of a model.

    Attributes:
        name: as users give it and the score file stores it.
        summary: what orders the components, in one sentence; for help and documentation.
        basis: that the components are taken in; of an algorithm that learns, the default.
        score: ranks the components of a model that was factorized in the basis.
        source: where it is from. learns: whether it trains masks and adapters: then it has hyper-parameters
            (:class:`acip_export.ranking.config.AcipConfig`), and its runs are stored and resumed.
    """

    name: str
    summary: str
    basis: Basis
    score: Callable[[RankContext, Factorized], Ranking]
    source: str = ""
    learns: bool = False


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
        raise UsageError(f"unknown ranking algorithm {name!r}; choose one of {', '.join(known)}")
    return known[name]


def learned_algorithms() -> str:
    """Return the names of the algorithms that learn, for messages."""
    return " or ".join(name for name, algorithm in algorithms().items() if algorithm.learns)


def as_scores(values: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return ``values`` by module as scores are stored."""
    return {name: numbers.astype(np.float32) for name, numbers in values.items()}
