"""Tell how far a stage has come: one report for every stage, and a clock that adds speed and time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a running stage.

    Attributes:
        stage: what is running: ``statistics``, ``convert``, ``measure rounding``.
        done, total: steps, bytes or tensors of this stage; ``total`` is ``None`` where it is not known beforehand.
        item: what is worked on, or was finished last.
        ratio: share of the linear layers' parameters that a ranking has left.
        loss: as last measured, in the unit of the model's task.
        tokens_per_second, eta_seconds: of this stage; ``None`` where they make no sense or cannot be told yet.
    """

    stage: str
    done: int
    total: int | None = None
    item: str = ""
    ratio: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


ProgressCallback = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Ignore a report: the default callback."""


class Clock:
    """Count the steps of one stage, and report each with speed and time left.

    Attributes:
        total: steps of the stage, if known. tokens: that one step reads. done: steps so far; a resumed stage starts
            above zero.
    """

    def __init__(
        self, stage: str, total: int | None, progress: ProgressCallback, tokens: float = 0, done: int = 0
    ) -> None:
        self.stage, self.total, self.progress, self.tokens = stage, total, progress, tokens
        self.done, self._first, self._started = done, done, time.perf_counter()

    def advance(
        self, steps: int = 1, ratio: float | None = None, loss: float | None = None, share: float | None = None
    ) -> None:
        """Report ``steps`` more. Stages that do not know their number of steps say which ``share`` is behind."""
        self.done += steps
        elapsed, taken = time.perf_counter() - self._started, self.done - self._first
        if share is None and self.total:
            share = taken / max(1, self.total - self._first)
        self.progress(
            Progress(
                stage=self.stage,
                done=self.done,
                total=self.total,
                ratio=ratio,
                loss=loss,
                tokens_per_second=taken * self.tokens / elapsed if self.tokens and elapsed else None,
                eta_seconds=elapsed * (1 - share) / share if share else None,
            )
        )
