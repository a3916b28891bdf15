"""Score components: the paper's score map, with ties broken by predicted loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.scores import FloatArray

_FLOAT32_BITS = 23


def update_score_map(scores: FloatArray, mask: FloatArray) -> FloatArray:
    """Take one step of the score map (ACIP, section 3.2), by component.

    Alive components score their mask value, those pruned in this step 0, those pruned before one less than they did.
    """
    pruned_before = scores <= 0
    updated = np.where(mask > 0, mask, np.where(pruned_before, scores - 1, 0))
    return updated.astype(np.float32)


def broken_ties(
    score_maps: Mapping[str, FloatArray], drop_losses: Mapping[str, npt.NDArray[np.float64]]
) -> dict[str, FloatArray]:
    """Make final scores: break ties of the score map by predicted loss, across all modules.

    A component pruned s steps before the end scores ``-s - 1 + fraction``, alive ones keep their mask value. The
    fraction is the component's rank by predicted loss among those pruned in the same step, rounded down to what float32
    can tell apart at that magnitude: what still ties keeps the order of the global order (module, component).
    """
    names = list(score_maps)
    scores = np.concatenate([score_maps[name] for name in names]).astype(np.float64)
    losses = np.concatenate([drop_losses[name] for name in names])
    final = scores.copy()
    for step in np.unique(scores[scores <= 0]):
        tied = np.flatnonzero(scores == step)
        ranks = np.empty(len(tied))
        ranks[np.argsort(losses[tied], kind="stable")] = np.arange(len(tied))
        levels = 2.0 ** (_FLOAT32_BITS - np.ceil(np.log2(1 - step)))
        final[tied] = step - 1 + np.floor(ranks / len(tied) * levels) / levels
    return split_like(score_maps, final)


def split_like(parts: Mapping[str, npt.NDArray[np.float32]], joined: npt.NDArray[np.float64]) -> dict[str, FloatArray]:
    """Cut one array into float32 pieces of the parts' lengths."""
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    pieces = np.split(joined.astype(np.float32), ends)
    return dict(zip(parts, pieces, strict=True))
