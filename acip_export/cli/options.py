"""Flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.units import size_name

# The headings of help, in their order; those of formats come before the last two.
TARGET, BUDGET, MODEL, OUTPUT, CHECK, MORE = "Target", "Budget", "Model", "Output", "Check", "More"
TEXT, METHOD, MACHINE = "Text", "Method", "Machine"
PANELS = ("Arguments", TARGET, BUDGET, TEXT, METHOD, MODEL, MACHINE, "Options", OUTPUT, CHECK, MORE)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR|ID",
        help="Model directory or Hugging Face id. Default: here.",
        rich_help_panel=MODEL,
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Score file. Default: the *.acip beside the model.", rich_help_panel=MODEL),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; errors too.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace what acip-export wrote there.", rich_help_panel=OUTPUT)]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Keep SVDs and the dense model's states there.", rich_help_panel=MODEL),
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


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks.", callback=_show_tracebacks, is_eager=True, rich_help_panel=MORE),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print results and errors only.",
        callback=_print_less,
        is_eager=True,
        rich_help_panel=MORE,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor.", rich_help_panel=MORE)]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Text to measure on. Default: what ranking held out.",
        rich_help_panel=CHECK,
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Tasks of lm-evaluation-harness, or YAML files of your own.",
        rich_help_panel=CHECK,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="Seconds a runtime may take for one context.",
        min=0.1,
        rich_help_panel=CHECK,
    ),
]
DeviceFile = Annotated[
    Path | None,
    typer.Option(
        "--devices", metavar="FILE", help="More devices; see  acip-export devices -h.", rich_help_panel=TARGET
    ),
]


def default_place(format_name: str, budget: int | None) -> Path:
    """Return where an export of this budget goes, unless told otherwise."""
    return Path("export") / (format_name if budget is None else f"{format_name}-{size_name(budget)}")


def names(listed: str) -> tuple[str, ...]:
    """The names of a flag that takes several, by comma."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def type_names(listed: str) -> tuple[str, ...]:
    """Return the weight types of a flag, which users may write in capitals."""
    return names(listed.lower())
