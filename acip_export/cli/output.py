"""Drawing: results on stdout, progress and diagnostics on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console

from acip_export.errors import AcipError
from acip_export.progress import Progress, ProgressCallback
from acip_export.units import format_seconds

# Wide enough for every table when nobody's terminal says otherwise.
_WIDTH = None if sys.stdout.isatty() else 120

_SECONDS_BETWEEN_LINES = 60

out = Console(highlight=False, width=_WIDTH)
err = Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """Machine-readable output: exactly one JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def done(data: Any, as_json: bool, message: str) -> None:
    """Say that a command is done: ``data`` as one JSON document, or ``message`` for people."""
    if as_json:
        print_json(data)
    else:
        out.print(message, markup=False)


def stream(text: str) -> None:
    """A piece of a model's text on stdout, at once; nothing in it moves the cursor or colours what follows."""
    sys.stdout.write("".join(c for c in text if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def print_error(error: AcipError) -> None:
    err.quiet = False
    first, _, rest = str(error).partition("\n")
    err.print("[bold red]error:[/] ", end="")
    err.print(first, markup=False)
    if rest:
        err.print(rest, markup=False)


def note(message: str) -> None:
    """A diagnostic, on stderr."""
    err.print(message, markup=False, style="dim")


def be_quiet(quiet: bool) -> None:
    """Print no progress and no notes; errors are always printed."""
    err.quiet = quiet


def annotate(line: str) -> None:
    """A line on stderr that a program reads, whatever people want to see."""
    sys.stderr.write(line + "\n")


@contextmanager
def stage_progress() -> Iterator[ProgressCallback]:
    """Show what is running on stderr: bars, one per stage, or on no terminal a line a minute."""
    if err.is_terminal:
        with _bars() as update:
            yield update
    else:
        yield ProgressLines()


class ProgressLines:
    """Prints what a stage reports, once a minute: for logs, and for jobs that nobody watches.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._printed = clock()
        self._stage, self._began, self._first = "", 0.0, 0

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if progress.stage != self._stage:
            self._stage, self._began, self._first = progress.stage, now, progress.done
        if now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        counted = f"{progress.done:,}" if progress.total is None else f"{progress.done:,} of {progress.total:,}"
        left = self._seconds_left(progress, now)
        parts = [f"{progress.stage} {counted}", *_figures(progress)]
        if left is not None:
            parts.append(f"about {format_seconds(left)} left")
        err.print(", ".join(parts), markup=False, soft_wrap=True)

    def _seconds_left(self, progress: Progress, now: float) -> float | None:
        """As reported, else by the speed of this stage so far."""
        taken = progress.done - self._first
        if progress.eta_seconds is not None or progress.total is None or not taken:
            return progress.eta_seconds
        return (now - self._began) / taken * (progress.total - progress.done)


@contextmanager
def _bars() -> Iterator[ProgressCallback]:
    bars = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description:<12}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("[dim]{task.fields[item]}"),
        console=err,
        transient=True,
        disable=err.quiet,
    )
    tasks: dict[str, rich.progress.TaskID] = {}
    with bars:

        def update(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, item="")
            figures = _figures(progress)
            if progress.total is None and progress.eta_seconds is not None:
                figures.append(f"about {format_seconds(progress.eta_seconds)} left")
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, item="  ".join(figures))

        yield update


def _figures(progress: Progress) -> list[str]:
    parts = [progress.item]
    if progress.ratio is not None:
        parts.append(f"ratio {progress.ratio:.2f}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    return [part for part in parts if part]
