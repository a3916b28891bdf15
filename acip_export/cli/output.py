"""Drawing: results on stdout, progress and diagnostics on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress
from rich.console import Console

from acip_export.errors import AcipError
from acip_export.progress import Progress, ProgressCallback

# Wide enough for every table when nobody's terminal says otherwise.
_WIDTH = None if sys.stdout.isatty() else 120

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


def print_error(error: AcipError) -> None:
    first, _, rest = str(error).partition("\n")
    err.print("[bold red]error:[/] ", end="")
    err.print(first, markup=False)
    if rest:
        err.print(rest, markup=False)


def note(message: str) -> None:
    """A diagnostic, on stderr."""
    err.print(message, markup=False, style="dim")


@contextmanager
def stage_bars() -> Iterator[ProgressCallback]:
    """Draw progress bars, one per stage; nothing when stderr is no terminal."""
    bars = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description:<12}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("[dim]{task.fields[item]}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    tasks: dict[str, rich.progress.TaskID] = {}
    with bars:

        def update(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, item="")
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, item=_figures(progress))

        yield update


def _figures(progress: Progress) -> str:
    parts = [progress.item]
    if progress.ratio is not None:
        parts.append(f"ratio {progress.ratio:.2f}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.total is None and progress.eta_seconds is not None:
        parts.append(f"about {progress.eta_seconds:.0f} s left")
    return "  ".join(part for part in parts if part)
