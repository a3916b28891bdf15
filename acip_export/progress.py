"""Tell how far a stage has come, with one report for every stage, and how far all of them have."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report of a running stage.

    Attributes:
        stage: what is running: ``statistics``, ``convert``, ``types of gguf``.
        done, total: steps, bytes or tensors of this stage; ``total`` is ``None`` where it is not known beforehand.
        item: what is worked on, or was finished last.
        ratio: share of the linear layers' parameters that a ranking has left.
        loss: as last measured, in the unit of the model's task.
        tokens_per_second, eta_seconds: of this stage; ``None`` where they make no sense or cannot be told yet.
        resumed: how many of ``done`` an earlier process has made.
    """

    stage: str
    done: int
    total: int | None = None
    item: str = ""
    ratio: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    resumed: int = 0


ProgressCallback = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Ignore a report: the default callback."""


def types_stage(format: str) -> str:
    """Name the stage that measures what a format's types cost."""
    return f"types of {format}"


class Clock:
    """Count the steps of one stage, and report each with speed and time left.

    Attributes:
        total: steps of the stage, if known. tokens: that one step reads. done: steps so far; a resumed stage starts
            above zero. share: what is behind then, of stages that do not know their number of steps.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        progress: ProgressCallback,
        tokens: float = 0,
        done: int = 0,
        share: float = 0.0,
    ) -> None:
        self.stage, self.total, self.progress, self.tokens = stage, total, progress, tokens
        self.done, self._first, self._behind, self._started = done, done, share, time.perf_counter()

    def advance(
        self, steps: int = 1, ratio: float | None = None, loss: float | None = None, share: float | None = None
    ) -> None:
        """Report ``steps`` more. Stages that do not know their number of steps say which ``share`` is behind."""
        self.done += steps
        elapsed, taken = time.perf_counter() - self._started, self.done - self._first
        if share is not None:
            share = (share - self._behind) / (1 - self._behind) if self._behind < 1 else 1.0
        elif self.total:
            share = taken / max(1, self.total - self._first)
        self.progress(
            Progress(
                stage=self.stage,
                done=self.done,
                total=self.total,
                resumed=self._first,
                ratio=ratio,
                loss=loss,
                tokens_per_second=taken * self.tokens / elapsed if self.tokens and elapsed else None,
                eta_seconds=elapsed * (1 - share) / share if share and share > 0 else None,
            )
        )


@dataclass(frozen=True)
class Course:
    """The stages that a command goes through, in their order.

    Attributes:
        shares: what each takes of the time, in any unit; those that are not known are added as they come.
        seconds: what all of them take on an ordinary machine, if that can be told; the stages behind correct it.
    """

    shares: Mapping[str, float]
    seconds: float | None = None


# What the estimate beforehand counts for, beside what was seen: as much as this share of the way.
_TRUST = 0.05


class Journey:
    """Add the stages of a command up: how much of it is done, and how long the rest takes.

    The time that the stages so far took for their shares tells how long those to come take.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, course: Course, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares, self._seconds, self._clock = dict(course.shares), course.seconds, clock
        self._started = self._began = self._heard = clock()
        self._finished = self._finished_earlier = 0.0
        self._at: Progress | None = None
        self._passed: set[str] = set()

    @property
    def at(self) -> Progress | None:
        """The last report."""
        return self._at

    def expect(self, course: Course) -> None:
        """Replace what stages to come are expected to take by what an estimate says, before the first report."""
        self._shares, self._seconds = dict(course.shares), course.seconds

    def __call__(self, progress: Progress) -> None:
        """Note a report."""
        now = self._clock()
        if progress.stage not in self._shares:
            known = self._shares.values()
            self._shares[progress.stage] = sum(known) / len(known) if known else 1.0
        if self._at is None or progress.stage != self._at.stage or progress.done < self._at.done:
            if self._at is not None:
                self._finished += self._shares[self._at.stage]
                self._finished_earlier += self._earlier
                self._began = self._heard
            # What comes before this one in the course is behind, done or left out.
            names = list(self._shares)
            self._passed.update(names[: names.index(progress.stage) + 1])
        self._at, self._heard = progress, now

    @property
    def share(self) -> float:
        """Of the whole, between 0 and 1."""
        done = self._finished + self._current * self._part
        return done / (done + self._current * (1 - self._part) + self._pending or 1.0)

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes; ``None``: nobody can tell yet, or no longer."""
        now = self._clock()
        done = self._finished + self._current * self._part
        total = done + self._current * (1 - self._part) + self._pending
        trust = 0.0 if self._seconds is None else _TRUST * total
        here = done - self._finished_earlier - self._earlier
        if here + trust <= 0:
            return None
        per_share = (self._heard - self._started + trust * (self._seconds or 0.0) / (total or 1.0)) / (here + trust)
        left = per_share * (total - done)
        at = self._at
        if at is not None and at.eta_seconds is not None:
            left = at.eta_seconds + per_share * self._pending
        left -= now - self._heard
        if left <= 0:
            return 0.0 if self.share == 1 else None
        return left

    @property
    def _current(self) -> float:
        return 0.0 if self._at is None else self._shares[self._at.stage]

    @property
    def _earlier(self) -> float:
        """How much of the present stage's share an earlier process has done: it says nothing about time."""
        at = self._at
        return self._current * min(1.0, at.resumed / at.total) if at is not None and at.total else 0.0

    @property
    def _pending(self) -> float:
        # A copy: the thread that draws asks while the one that works adds.
        return sum(share for name, share in list(self._shares.items()) if name not in self._passed)

    @property
    def _part(self) -> float:
        """How much of the present stage is done."""
        at = self._at
        if at is None:
            return 0.0
        if at.total:
            return min(1.0, at.done / at.total)
        elapsed = self._heard - self._began
        return 0.0 if at.eta_seconds is None else elapsed / (elapsed + at.eta_seconds or 1.0)
