"""Numbers from logits. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from math import exp, isfinite, sqrt
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.report import Agreement, Divergence, Perplexity
from acip_export.formats.session import Logits, Windows

# Numbers of a float64 copy of logits.
_PIECE = 1 << 22


_Figures = TypeVar("_Figures", Agreement, Perplexity, Divergence)


def finite(figures: _Figures | None) -> _Figures | None:
    """Return ``figures`` if all of them are finite numbers, else ``None``: nothing was measured."""
    return figures if figures is not None and all(map(isfinite, dataclasses.astuple(figures))) else None


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def compare_logits(
    reference: Iterable[Logits], other: Iterable[Logits], greedy: tuple[list[int], list[int]]
) -> Agreement:
    """Compare position by position; ``greedy`` holds the continuations of the reference and the other."""
    difference, kl, same, positions = 0.0, 0.0, 0, 0
    for a, b in zip(reference, other, strict=True):
        centred = (a - a.mean(-1, keepdims=True)) - (b - b.mean(-1, keepdims=True))
        difference = max(difference, float(np.abs(centred).max()))
        log_a, log_b = log_softmax(a), log_softmax(b)
        kl += float((np.exp(log_a) * (log_a - log_b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        positions += len(a)
    expected, found = greedy
    equal = next((i for i, (x, y) in enumerate(zip(expected, found, strict=True)) if x != y), len(expected))
    return Agreement(positions, difference, kl / positions, same / positions, equal, len(expected))


def perplexity(logits: Iterable[Logits], windows: Windows) -> Perplexity:
    """Of the windows' tokens but the first of each; ``windows`` (n, tokens), tokens > 1."""
    losses = [_losses(scores, window) for scores, window in zip(logits, windows, strict=True)]
    return _perplexity(np.concatenate(losses))


def compare_with_dense(
    dense: Iterable[Logits], other: Iterable[Logits], windows: Windows
) -> tuple[Perplexity, Perplexity, Divergence]:
    """Perplexities of both and the divergence. Holds two windows' logits, and per token three numbers.

    Args:
        dense, other: float32 (tokens, vocabulary) for each window of ``windows`` (n, tokens), tokens > 1.
    """
    columns: list[npt.NDArray[np.float64]] = []
    for a, b, window in zip(dense, other, windows, strict=True):
        for rows in _slices(len(window) - 1, a.shape[-1]):
            log_a, log_b = log_softmax(a[rows]), log_softmax(b[rows])
            picked = np.arange(len(log_a)), window[rows.start + 1 : rows.stop + 1]
            kl = (np.exp(log_a) * (log_a - log_b)).sum(-1)
            same = log_a.argmax(-1) == log_b.argmax(-1)
            columns.append(np.stack([-log_a[picked], -log_b[picked], kl, same]))
    dense_loss, loss, kl, same = np.concatenate(columns, axis=1)
    divergence = Divergence(
        *_mean_and_error(kl),
        float(np.quantile(kl, 0.999)),
        *_mean_and_error(loss - dense_loss),
        same_top=float(same.mean()),
        tokens=len(kl),
    )
    return _perplexity(dense_loss), _perplexity(loss), divergence


def _losses(scores: Logits, window: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(tokens - 1,) of one window."""
    pieces = [
        -log_softmax(scores[rows])[np.arange(rows.stop - rows.start), window[rows.start + 1 : rows.stop + 1]]
        for rows in _slices(len(window) - 1, scores.shape[-1])
    ]
    losses: npt.NDArray[np.float64] = np.concatenate(pieces)
    return losses


def _slices(count: int, width: int) -> Iterator[slice]:
    """Rows in pieces that float64 copies of stay small, however long the context and large the vocabulary."""
    step = max(1, _PIECE // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _perplexity(losses: npt.NDArray[np.float64]) -> Perplexity:
    mean, error = _mean_and_error(losses)
    return Perplexity(exp(min(mean, 700.0)), mean, error, len(losses))


def _mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    error = float(values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), error
