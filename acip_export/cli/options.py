"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console

Model = Annotated[str, typer.Option("--model", "-m", help="Model directory or Hugging Face id.", show_default=True)]
Scores = Annotated[Path | None, typer.Option(help="Score file. Default: the *.acip beside the model.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what acip-export wrote there.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Directory that keeps SVDs and the dense model's states on the text, for other sizes."
    ),
]


@dataclass
class ErrorBoundary:
    """What the commands tell the error boundary around them: the ``obj`` of their contexts.

    Attributes:
        debug: whether an error is shown with its traceback.
    """

    debug: bool = False


def _show_tracebacks(context: typer.Context, value: bool) -> bool:
    boundary = context.ensure_object(ErrorBoundary)
    boundary.debug = boundary.debug or value  # given before the command or after it
    return value


def _print_less(value: bool) -> bool:
    if value:  # given before the command or after it
        console.be_quiet(True)
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", callback=_show_tracebacks, is_eager=True)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print results and errors only.", callback=_print_less, is_eager=True),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor.")]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="Text to measure perplexity and divergence on. Default: what the ranking held out."),
]
Tasks = Annotated[
    str, typer.Option("--tasks", help="Tasks of lm-evaluation-harness, by comma: names, or YAML files of your own.")
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds that a runtime may take for one context.", min=0.1)]
DeviceFile = Annotated[
    Path | None, typer.Option("--devices", metavar="FILE", help="More devices; see  acip-export devices --help.")
]


def names(listed: str) -> tuple[str, ...]:
    """The names of a flag that takes several, by comma."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def type_names(listed: str) -> tuple[str, ...]:
    """Return the weight types of a flag, which users may write in capitals."""
    return names(listed.lower())
