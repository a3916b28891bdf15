"""From counted steps to progress reports."""

from __future__ import annotations

import time

from acip_export.ranking.config import Phase, Progress, ProgressCallback


class Clock:
    """Reports one phase: ``total`` steps of ``tokens`` each (``total`` may be unknown)."""

    def __init__(self, phase: Phase, total: int | None, tokens: int, progress: ProgressCallback, step: int = 0) -> None:
        self.phase, self.total, self.tokens, self.progress = phase, total, tokens, progress
        self.step, self._first, self._started = step, step, time.perf_counter()

    def advance(self, steps: int = 1, ratio: float = 1.0, loss: float | None = None, done: float | None = None) -> None:
        """``done``: share of the phase that is behind, for phases that do not know their number of steps."""
        self.step += steps
        elapsed = time.perf_counter() - self._started
        if done is None and self.total:
            done = (self.step - self._first) / max(1, self.total - self._first)
        self.progress(
            Progress(
                phase=self.phase,
                step=self.step,
                total=self.total,
                ratio=ratio,
                loss=loss,
                tokens_per_second=(self.step - self._first) * self.tokens / elapsed
                if self.tokens and elapsed
                else None,
                eta_seconds=elapsed * (1 - done) / done if done else None,
            )
        )
