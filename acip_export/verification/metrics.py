"""Numbers from logits. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from math import exp, isfinite, sqrt
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from acip_export.artifacts.report import Agreement, Divergence, Perplexity
from acip_export.formats.session import Logits

Floats = npt.NDArray[np.float64]

# Numbers of a float64 copy of logits: it stays in a core's cache.
_PIECE = 1 << 18


_Figures = TypeVar("_Figures", Agreement, Perplexity, Divergence)


def finite(figures: _Figures | None) -> _Figures | None:
    """Return ``figures`` if all of them are finite numbers, else ``None``: nothing was measured."""
    return figures if figures is not None and all(map(isfinite, dataclasses.astuple(figures))) else None


def log_softmax(logits: Logits) -> Floats:
    """Of the last axis, in float64."""
    import torch  # its threads and vector instructions take a fifth of numpy's time

    found: Floats = torch.log_softmax(torch.from_numpy(np.ascontiguousarray(logits)).double(), -1).numpy()
    return found


def compare_logits(
    reference: Iterable[Logits], other: Iterable[Logits], greedy: tuple[list[int], list[int]]
) -> Agreement:
    """Compare position by position; ``greedy`` holds the continuations of the reference and the other."""
    figures, others = [], iter(other)
    for expected in reference:  # no zip: it holds the last pair until it has the next
        found = next(others)
        figures.append(window_agreement(expected, found))
        del expected, found
    return agreement(figures, greedy)


def window_agreement(expected: Logits, found: Logits) -> Floats:
    """Return what :func:`agreement` wants of a window: largest difference, sums of KL and equal tops, positions."""
    difference, kl, same = 0.0, 0.0, 0
    for rows in _slices(*expected.shape):
        a, b = expected[rows], found[rows]
        centred = (a - a.mean(-1, keepdims=True)) - (b - b.mean(-1, keepdims=True))
        # Not max(): it would drop NaN.
        difference = float(np.maximum(difference, np.abs(centred).max()))
        kl += float(_divergences(log_softmax(a), log_softmax(b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return np.array([difference, kl, same, len(expected)], np.float64)


def agreement(figures: Sequence[Floats], greedy: tuple[list[int], list[int]]) -> Agreement:
    """Of the :func:`window_agreement` of all windows; ``greedy`` as :func:`compare_logits`."""
    differences, kl, same, positions = np.stack(figures).T
    count = int(positions.sum())
    return Agreement(
        count,
        float(differences.max()),
        float(kl.sum()) / count,
        int(same.sum()) / count,
        equal_tokens(*greedy),
        len(greedy[0]),
    )


def equal_tokens(expected: Sequence[int], found: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(expected, found, strict=True)) if x != y), len(expected))


def token_losses(logits: Logits, window: npt.NDArray[np.int64]) -> Floats:
    """The loss of every token of a window but the first: (tokens - 1,)."""
    return np.concatenate(
        [-log_softmax(logits[rows])[_picked(rows, window)] for rows in _slices(len(window) - 1, logits.shape[-1])]
    )


def token_figures(dense: Logits, other: Logits, window: npt.NDArray[np.int64]) -> Floats:
    """For every token of a window but the first: both models' losses, KL, and whether the top is the same.

    Args:
        dense, other: float32 (tokens, vocabulary).

    Returns:
        (4, tokens - 1).
    """
    columns = []
    for rows in _slices(len(window) - 1, dense.shape[-1]):
        log_a, log_b = log_softmax(dense[rows]), log_softmax(other[rows])
        picked = _picked(rows, window)
        same = dense[rows].argmax(-1) == other[rows].argmax(-1)
        losses = -log_a[picked], -log_b[picked]
        columns.append(np.stack([*losses, _divergences(log_a, log_b), same]))
    return np.concatenate(columns, axis=1)


def compare_with_dense(figures: Sequence[Floats]) -> tuple[Perplexity, Perplexity, Divergence]:
    """Perplexities of both models and the divergence, of the :func:`token_figures` of all windows."""
    dense_loss, loss, kl, same = np.concatenate(figures, axis=1)
    divergence = Divergence(
        *_mean_and_error(kl),
        float(np.quantile(kl, 0.999)),
        *_mean_and_error(loss - dense_loss),
        same_top=float(same.mean()),
        tokens=len(kl),
    )
    return perplexity([dense_loss]), perplexity([loss]), divergence


def perplexity(losses: Sequence[Floats]) -> Perplexity:
    """Of the :func:`token_losses` of all windows."""
    every = np.concatenate(losses)
    mean, error = _mean_and_error(every)
    return Perplexity(exp(min(mean, 700.0)), mean, error, len(every))


def _divergences(log_a: Floats, log_b: Floats) -> Floats:
    """KL(a || b) of every row. Overwrites both."""
    import torch

    a, b = torch.from_numpy(log_a), torch.from_numpy(log_b)
    torch.sub(a, b, out=b)
    found: Floats = b.mul_(a.exp_()).sum(-1).numpy()
    return found


def _picked(rows: slice, window: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return np.arange(rows.stop - rows.start), window[rows.start + 1 : rows.stop + 1]


def _slices(count: int, width: int) -> Iterator[slice]:
    """Rows in pieces that float64 copies of stay small, however long the context and large the vocabulary."""
    step = max(1, _PIECE // width)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _mean_and_error(values: Floats) -> tuple[float, float]:
    error = float(values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0
    return float(values.mean()), error
