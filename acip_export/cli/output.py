"""Drawing: results on stdout, progress and diagnostics on stderr. Nothing else in the package prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from acip_export.errors import AcipError

if TYPE_CHECKING:
    from acip_export.api import StageProgress
    from acip_export.ranking import Progress as RankingProgress

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
def stage_bars() -> Iterator[Callable[[StageProgress], None]]:
    """Progress bars, one per stage; silent when stderr is no terminal."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[item]}"),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    tasks: dict[str, Any] = {}
    with bars:

        def update(progress: StageProgress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, item="")
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, item=progress.item)

        yield update


@contextmanager
def ranking_bars() -> Iterator[Callable[[RankingProgress], None]]:
    """One bar per phase of a ranking, with the current ratio, loss and speed."""
    from acip_export.api import StageProgress

    with stage_bars() as update:

        def draw(progress: RankingProgress) -> None:
            parts = [f"ratio {progress.ratio:.2f}" if progress.phase != "statistics" else ""]
            parts += [f"loss {progress.loss:.3f}" if progress.loss is not None else ""]
            parts += [f"{progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else ""]
            if progress.total is None and progress.eta_seconds is not None:
                parts.append(f"about {progress.eta_seconds:.0f} s left")
            item = "  ".join(part for part in parts if part)
            update(StageProgress(progress.phase, progress.step, progress.total, item))

        yield draw
