"""Numbers from logits. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
import numpy.typing as npt

from acip_export.verify.runtime import Logits, Windows


@dataclass(frozen=True)
class Agreement:
    """How close two models are on the same tokens.

    Attributes:
        max_logit_difference: after removing each position's mean, which no probability depends on.
        mean_kl: KL(reference || other), nats per token. same_top: share of positions with the same most likely token.
        greedy_equal: leading tokens of a greedy continuation that agree, ``greedy_tokens`` of them compared.
    """

    positions: int
    max_logit_difference: float
    mean_kl: float
    same_top: float
    greedy_equal: int
    greedy_tokens: int


@dataclass(frozen=True)
class Perplexity:
    """Teacher-forced, non-overlapping windows; ``standard_error`` of the mean loss, by window."""

    perplexity: float
    mean_loss: float
    standard_error: float
    tokens: int


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
    """Mean over the windows' inner positions: the first token of a window is context only."""
    losses = [
        float(-log_softmax(scores[:-1])[np.arange(len(window) - 1), window[1:]].mean())
        for scores, window in zip(logits, windows, strict=True)
    ]
    mean = float(np.mean(losses))
    error = float(np.std(losses, ddof=1) / sqrt(len(losses))) if len(losses) > 1 else float("nan")
    return Perplexity(exp(min(mean, 700.0)), mean, error, windows.shape[0] * (windows.shape[1] - 1))
