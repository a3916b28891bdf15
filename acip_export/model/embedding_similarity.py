"""How well a compressed encoder keeps the similarities of its texts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# All pairs of this many texts: 32,640.
_MOST_TEXTS = 256


@dataclass(frozen=True)
class Similarity:
    """Cosine similarities of all pairs of texts, against the dense model's.

    Attributes:
        pairs: that were compared. spearman: rank correlation; it is 1 when every ranking of search results stays.
        mean_error: mean absolute difference of the cosines.
        mean_distance: mean cosine distance of each text's embedding from the dense model's.
    """

    pairs: int
    spearman: float
    mean_error: float
    mean_distance: float


def compare_similarities(embeddings: npt.NDArray[np.floating], dense: npt.NDArray[np.floating]) -> Similarity:
    """Compare (n, width) embeddings of the same texts; at most the first 256 texts make pairs.

    Raises:
        ValueError: fewer than three texts, which have no ranks to compare.
    """
    if len(dense) < 3:
        raise ValueError(f"{len(dense)} texts are too few to compare similarities, at least 3 are needed")
    a, b = _unit(embeddings), _unit(dense)
    pairs = np.triu_indices(min(len(a), _MOST_TEXTS), 1)
    ours, theirs = (a[:_MOST_TEXTS] @ a[:_MOST_TEXTS].T)[pairs], (b[:_MOST_TEXTS] @ b[:_MOST_TEXTS].T)[pairs]
    return Similarity(
        pairs=len(ours),
        spearman=spearman(ours, theirs),
        mean_error=float(np.abs(ours - theirs).mean()),
        mean_distance=float(1 - (a * b).sum(1).mean()),
    )


def spearman(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Return the rank correlation of two vectors; ties share their mean rank.

    It is NaN where ranks say nothing: all values of one vector are equal, or one is not finite.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or a.min() == a.max() or b.min() == b.max():
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: npt.NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[places]


def _unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    unit: npt.NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return unit
