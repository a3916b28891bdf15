"""What a way to rank is: its name, its basis, and the function that orders the components of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
            (:class:`acip_export.ranking.config.AcipConfig`), and its runs are stored and resumed. fisher: whether it
            looks at the Fisher information of the masks, for which the statistics keep samples.
    """

    name: str
    summary: str
    basis: Basis
    score: Callable[[RankContext, Factorized], Ranking]
    source: str = ""
    learns: bool = False
    fisher: bool = False


def as_scores(values: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return ``values`` by module as scores are stored."""
    return {name: numbers.astype(np.float32) for name, numbers in values.items()}
