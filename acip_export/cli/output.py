"""Drawing: results on stdout, progress and diagnostics on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rich.progress
import rich.progress_bar
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Span, Text

from acip_export.errors import AcipError
from acip_export.interrupted import INTERRUPTED
from acip_export.progress import Course, Journey, Progress
from acip_export.units import format_seconds

_SECONDS_BETWEEN_LINES = 30
_UNKNOWN = Course({})
# Columns that the bar takes.
_BAR = 20


class ClosedPipeError(Exception):
    """Nobody reads the standard output any more. No OSError: the parser of the command line would take it."""


class _WithoutTrailingBlanks(RenderHook):
    """Leaves out what tables and padding put before the end of a line: nobody sees it, but files and pipes get it."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """See :class:`rich.console.RenderHook`."""
        return [_Trimmed(each) for each in renderables]


@dataclass(frozen=True)
class _Trimmed:
    """Something drawn without the blanks before each line break; those at its own end stay, for what is put behind."""

    drawn: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blanks = list[Segment]()
        for segment in console.render(self.drawn, options):
            if segment.control:
                yield segment
                continue
            for part in re.findall(r"\n|[^\n]+", segment.text):
                text = part.rstrip(" \n")
                if text:
                    yield from blanks
                    yield Segment(text, segment.style)
                    blanks.clear()
                if part == "\n":
                    yield Segment.line()
                    blanks.clear()
                elif len(text) < len(part):
                    blanks.append(Segment(part[len(text) :], segment.style))
        yield from blanks


class _Trimming(Console):
    """Prints no blanks before the end of a line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)
        self.push_render_hook(_WithoutTrailingBlanks())


class Results(_Trimming):
    """Standard output. A pipe that nobody reads any more ends the command, with the code that main has for it."""

    def on_broken_pipe(self) -> None:
        raise ClosedPipeError


class Diagnostics(_Trimming):
    """Standard error. The work goes on when nobody reads what it says."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


# As wide as the terminal or COLUMNS says; every table and every page of help fits 80 columns.
out = Results()
err = Diagnostics(stderr=True)


@dataclass
class _Documents:
    """Whether JSON was asked for, and printed: there is one document on stdout, of the result or of the error."""

    wanted: bool = False
    printed: bool = False
    collected: list[Any] | None = None


_documents = _Documents()


def start(as_json: bool) -> None:
    """Begin a command: not quiet, nothing printed yet."""
    be_quiet(False)
    _documents.wanted, _documents.printed, _documents.collected = as_json, False, None


def print_json(data: Any) -> None:
    """Machine-readable output: exactly one JSON document on stdout."""
    if _documents.collected is not None:
        _documents.collected.append(data)
        return
    _documents.printed = True
    try:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    except BrokenPipeError:
        raise ClosedPipeError from None


@contextmanager
def collected_json() -> Iterator[list[Any]]:
    """Keep the documents of commands that are run by another, which makes one of them all."""
    _documents.collected = collected = list[Any]()
    try:
        yield collected
    finally:
        _documents.collected = None


def done(data: Any, as_json: bool, message: str) -> None:
    """Say that a command is done: ``data`` as one JSON document, or ``message`` for people."""
    if as_json:
        print_json(data)
    else:
        say(message)


def say(text: str, indent: int = 0, markup: bool = False, style: str | None = None) -> None:
    """Print a sentence on stdout: wrapped at words, or on one line where there is no width to fit."""
    if _wraps(out):
        out.print(Padding(Text.from_markup(text) if markup else Text(text), (0, 0, 0, indent)), style=style)
    else:
        out.print(" " * indent + text, markup=markup, style=style, soft_wrap=True)


def _wraps(console: Console) -> bool:
    return console.is_terminal or "COLUMNS" in os.environ


def show_command(text: str, shell: bool) -> None:
    """Print what is to be copied: never wrapped, but a long line of a shell goes on below its backslash."""
    for line in text.splitlines():
        if shell and len(line) > out.width:
            line = _continued(line, out.width)
        out.print(line, markup=False, soft_wrap=True)


def _continued(command: str, width: int) -> str:
    """Break a command before its flags."""
    lines = [""]
    for part in re.split(r" (?=-)", command):
        if lines[-1] and len(f"{lines[-1]} {part} \\") > width:
            lines.append(f"    {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return " \\\n".join(lines)


def stream(text: str) -> None:
    """A piece of a model's text on stdout, at once; nothing in it moves the cursor or colours what follows."""
    sys.stdout.write("".join(c for c in text if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def print_error(error: AcipError) -> None:
    """Say what went wrong: on stderr, or as the JSON document on stdout, if the result is not one already."""
    if _documents.wanted and not _documents.printed:
        print_json(error.to_json())
        return
    err.quiet = False
    _tell(f"error: {error}", Span(0, len("error:"), "bold red"))


def interrupted(code: int) -> None:
    """Say that the user stopped the command."""
    if _documents.wanted and not _documents.printed:
        print_json({"error": INTERRUPTED, "code": code, "kind": "KeyboardInterrupt"})
    else:
        note(INTERRUPTED)


def _tell(message: str, *styles: Span, style: str = "") -> None:
    """Print sentences on stderr: folded at words, an indented line below its first one; whole where it is a log."""
    folds = _wraps(err)
    text = "\n".join(_folded(line, max(1, err.width)) for line in message.split("\n")) if folds else message
    err.print(Text(text, style, spans=list(styles)), soft_wrap=not folds)


def _folded(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip(" "))]
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        expand_tabs=False,
        replace_whitespace=False,
        break_on_hyphens=False,
    )


def note(message: str) -> None:
    """A diagnostic, on stderr."""
    _tell(message, style="dim")


class _Warnings(logging.Handler):
    """Prints warnings as sentences, on a line of their own beside the bar; they are no notes, so that none is quiet."""

    def emit(self, record: logging.LogRecord) -> None:
        """See :class:`logging.Handler`."""
        message = self.format(record)
        if err.quiet:
            annotate(message)
        else:
            _tell(message, style="yellow")


def print_warnings() -> None:
    """Print what loggers warn of, before a library that is imported later gives them its own form."""
    logging.basicConfig(format="%(message)s", handlers=[_Warnings()])


def be_quiet(quiet: bool) -> None:
    """Print no progress and no notes; errors are always printed."""
    err.quiet = quiet


def annotate(line: str) -> None:
    """A line on stderr that a program reads, whatever people want to see."""
    sys.stderr.write(line + "\n")


@contextmanager
def stage_progress(course: Course = _UNKNOWN) -> Iterator[Journey]:
    """Show how far a command has come, on stderr: one bar, or on no terminal a line every half a minute."""
    journey = Journey(course)
    with _bar(journey) if err.is_terminal and not err.quiet else _lines(journey):
        yield journey


@contextmanager
def _lines(journey: Journey) -> Iterator[None]:
    lines, done = ProgressLines(journey), threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            lines.print_due()

    # Beside the work: a stage that does not report for minutes is one that people want to hear of.
    threading.Thread(target=watch, name="progress", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class ProgressLines:
    """Prints how far a command has come, every half a minute: for logs, and for jobs that nobody watches.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, journey: Journey, clock: Callable[[], float] = time.monotonic) -> None:
        self._journey, self._clock = journey, clock
        self._printed = clock()

    def print_due(self) -> None:
        """Print a line, if it is time."""
        now = self._clock()
        if now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        parts = [f"{self._journey.share:.0%}", *_told(self._journey)]
        err.print(", ".join(parts), markup=False, soft_wrap=True)


@contextmanager
def _bar(journey: Journey) -> Iterator[None]:
    bar = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        _OverallBar(journey),
        console=err,
        transient=True,
    )
    with bar:
        bar.add_task("")
        yield


class _OverallBar(rich.progress.ProgressColumn):
    """One bar for all stages; what does not fit the line is left out at its end."""

    def __init__(self, journey: Journey) -> None:
        super().__init__()
        self._journey = journey

    def render(self, task: rich.progress.Task) -> Table:  # noqa: ARG002 - the journey knows
        told = Text(", ".join(_told(self._journey)))
        told.truncate(max(0, err.width - _BAR - 10))
        line = Table.grid(Column(width=_BAR), Column(width=4, justify="right"), Column(), padding=(0, 1))
        share = self._journey.share
        line.add_row(rich.progress_bar.ProgressBar(total=1.0, completed=share, width=_BAR), f"{share:.0%}", told)
        return line


def _told(journey: Journey) -> list[str]:
    """Time left, the stage, and what it says."""
    left, at = journey.seconds_left, journey.at
    parts = [] if left is None else [f"about {format_seconds(left)} left"]
    if at is None:
        return [*parts, "starting"]
    counted = "" if not at.done else f" {at.done:,}" if at.total is None else f" {at.done:,} of {at.total:,}"
    return [*parts, f"{at.stage}{counted}", *_figures(at)]


def _figures(progress: Progress) -> list[str]:
    parts = []
    if progress.ratio is not None:
        parts.append(f"ratio {progress.ratio:.2f}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    return [*parts, progress.item] if progress.item else parts
