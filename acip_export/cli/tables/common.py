"""Tables that several subjects share."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from acip_export.check.compare import signed
from acip_export.cli import output as console
from acip_export.inspection import TensorChange
from acip_export.units import format_bytes


def plain_table(*columns: str, title: str | None = None, show_header: bool = True) -> Table:
    table = Table(
        *columns,
        title=title,
        title_justify="left",
        show_header=show_header,
        box=None,
        padding=(0, 1),
        header_style="dim",
    )
    for column in table.columns:
        column.overflow = "fold"  # names are what a reader came for
    return table


def facts_table(title: str | None = None) -> Table:
    """A name, a figure and what it says, on each row."""
    table = plain_table("", "", "", title=title, show_header=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    table.columns[0].style = table.columns[2].style = "dim"
    table.columns[1].justify = "right"
    return table


def size_text(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def show_changes(changes: Sequence[TensorChange], shown: int) -> None:
    """The ``shown`` largest changes; where names would be folded, without the differences that was and is say too."""
    table = _changes_table(changes[:shown], with_delta=True)
    if Measurement.get(console.out, console.out.options, table).maximum >= console.out.width:
        table = _changes_table(changes[:shown], with_delta=False)
    console.out.print(table)
    if len(changes) > shown:
        console.say(f"  and {len(changes) - shown} more", style="dim")


def _changes_table(changes: Sequence[TensorChange], *, with_delta: bool) -> Table:
    table = plain_table("tensor", "was", "is", *(["change"] if with_delta else []), "")
    for column in table.columns[1:-1]:
        column.justify = "right"
        column.no_wrap = True
    for change in changes:
        table.add_row(
            # Nearly all are weights; a bias says so.
            escape(change.name.removesuffix(".weight")),
            size_text(None if change.before is None else change.before.nbytes),
            size_text(None if change.after is None else change.after.nbytes),
            *([signed(change.delta)] if with_delta else []),
            escape(change.what),
        )
    return table
