"""Rankings that need no gradient steps: the score is read off the singular components.

``magnitude``  plain SVD, by singular value.
``energy``     SVD of W H^(1/2), by singular value: the output energy lost (SVD-LLM, arXiv 2403.07378).
``kfac``       SVD of G^(1/2) W H^(1/2), by half the squared singular value: the predicted loss itself, numbers that
               compare across layers.
``first-order`` SVD of W H^(1/2), by first-order loss estimates balanced to sum to zero (:mod:`.first_order`).
``fisher``     the components of ``kfac``, by the Fisher information of their masks
               (:mod:`acip_export.ranking.algorithms.fisher`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.scores import FloatArray
from acip_export.ranking.config import Algorithm


def training_free_scores(
    algorithm: Algorithm,
    singular: Mapping[str, FloatArray],
    drop_losses: Mapping[str, npt.NDArray[np.float64]],
) -> dict[str, FloatArray]:
    """Scores by module, by component; positive, larger is more important."""
    if algorithm in ("kfac", "fisher"):
        return {name: losses.astype(np.float32) for name, losses in drop_losses.items()}
    return {name: values.astype(np.float32) for name, values in singular.items()}
