"""``acip-export calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from acip_export.artifacts.speeds import SPEEDS_KIND, SpeedTable, save_speeds
from acip_export.cli import output as console
from acip_export.cli.options import OUTPUT, TARGET, Debug, Force, Json, Quiet
from acip_export.cli.tables.common import plain_table
from acip_export.devices import speeds_file
from acip_export.errors import MissingExtraError
from acip_export.formats.registry import export_format, format_names
from acip_export.io.outputs import claim_output
from acip_export.io.processes import let_threads_spin
from acip_export.units import format_error


def calibrate(
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="NAME",
            help="Measure this format's runtimes only; repeatable.",
            autocompletion=format_names,
            rich_help_panel=TARGET,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Default: where plans for this machine look.", rich_help_panel=OUTPUT
        ),
    ] = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how fast this machine is, so that plans predict tokens per second.

    acip-export calibrate

    acip-export calibrate --format gguf -o board.json

    Models of random numbers run in the installed runtimes, in every type that plans choose from: about two minutes, on
    a machine that does nothing else.
    """
    from acip_export.api.speed import measure_speeds

    names = tuple(export_format(name.lower()).name for name in format_ or ())
    file = out or speeds_file()
    # What this command keeps in its own place is measured anew.
    claim_output(file, SPEEDS_KIND, force or out is None, ())
    let_threads_spin()  # as they do where exports run
    with console.stage_progress() as progress:
        table = measure_speeds(progress, names)
    if not table.runtimes:
        raise MissingExtraError("a runtime", "all", "measuring its speed")
    save_speeds(table, file, force or out is None)
    if json:
        console.print_json(table.to_json())
        return
    console.out.print(speeds_table(table))
    for runtime, speeds in table.runtimes.items():
        prompts, answers = format_error(speeds.prompt_error), format_error(speeds.answer_error)
        console.say(f"predictions for {runtime}: prompts {prompts}, answers {answers}")
    console.say(f"{table.machine}, {table.threads} threads; kept in {file}")


def speeds_table(table: SpeedTable) -> Table:
    """A row for each runtime and type: what the largest model showed, and how fast the smallest was read."""
    shown = plain_table("runtime", "type", "read", "computed", "read from cache")
    for column in shown.columns[2:]:
        column.justify = "right"
    for runtime, speeds in table.runtimes.items():
        for name, measured in speeds.matrices.items():
            small, large = (end(measured, key=lambda speed: speed.nbytes) for end in (min, max))
            read, computed = _billions(large.read, "B/s"), _billions(large.compute, "FLOP/s")
            shown.add_row(runtime, name, read, computed, _billions(small.read, "B/s"))
    return shown


def _billions(speed: float, unit: str) -> str:
    number = speed / 1e9
    return f"{number:.3g} G{unit}" if number < 1000 else f"{number:,.0f} G{unit}"
