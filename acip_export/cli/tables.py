"""Tables of ``inspect`` and ``check``. Names from files are printed as they are, never as markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from acip_export.check.compare import Result, signed
from acip_export.check.run import Outcome
from acip_export.cli import output as console
from acip_export.inspection import Anatomy, TensorChange
from acip_export.inspection.anatomy import Share
from acip_export.inspection.diff import extents
from acip_export.units import format_bytes

_CHANGES_SHOWN = 5
_STATUS = {"ok": "[green]ok[/]", "failed": "[bold red]failed[/]", "skipped": "[yellow]skipped[/]"}


def show_anatomy(anatomy: Anatomy, top: int) -> None:
    """Totals, then bytes by file, type and layer group, then the largest tensors."""
    table = _table(title=f"{escape(anatomy.path)} ({anatomy.kind})", show_header=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(justify="right")
    table.add_column(justify="right")
    total = anatomy.total_bytes
    table.add_row("total", format_bytes(total), f"{total:,} bytes")
    table.add_row("tensors", format_bytes(anatomy.tensor_bytes), _share(anatomy.tensor_bytes, total))
    table.add_row("everything else", format_bytes(anatomy.overhead_bytes), _share(anatomy.overhead_bytes, total))
    if len(anatomy.files) > 1:
        for name, size in sorted(anatomy.files.items(), key=lambda item: -item[1]):
            table.add_row(f"  {escape(name)}", format_bytes(size), _share(size, total))
    console.out.print(table)
    _shares("type", anatomy.by_type(), anatomy.tensor_bytes)
    _shares("layers", anatomy.by_group(), anatomy.tensor_bytes)
    if top and anatomy.tensors:
        largest = _table("largest tensors", "shape", "type", "bytes")
        for tensor in anatomy.largest(top):
            largest.add_row(escape(tensor.name), extents(tensor.shape), escape(tensor.type), f"{tensor.nbytes:,}")
        console.out.print()
        console.out.print(largest)
    if anatomy.facts:
        facts = _table("metadata", "")
        for key, value in anatomy.facts.items():
            facts.add_row(escape(key), escape(value))
        console.out.print()
        console.out.print(facts)


def show_difference(before: Anatomy, after: Anatomy, changes: Sequence[TensorChange], top: int) -> None:
    """Totals of both, and the ``top`` largest changes."""
    table = _table("", "was", "is", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, was, now in (
        ("total", before.total_bytes, after.total_bytes),
        ("tensors", before.tensor_bytes, after.tensor_bytes),
        ("everything else", before.overhead_bytes, after.overhead_bytes),
    ):
        table.add_row(label, format_bytes(was), format_bytes(now), signed(now - was, was))
    console.out.print(f"{before.path} → {after.path}", markup=False)
    console.out.print(table)
    console.out.print()
    if changes:
        _changes(changes, top)
    else:
        console.out.print(f"all {len(after.tensors)} tensors are stored alike")


def show_check(outcome: Outcome, summary: str, verbose: bool) -> None:
    """One row an entry, what failed and why, and the tensors that changed."""
    table = _table("", "check", "size", "baseline", "change", "limit", "quality kept")
    for column in table.columns[2:]:
        column.justify = "right"
    for result in outcome.results:
        table.add_row(
            _STATUS[result.status],
            escape(result.name),
            _size(result.total_bytes),
            _size(result.baseline_bytes),
            result.change,
            _size(result.limit_bytes),
            "" if result.recovery is None else f"{result.recovery:.2%}",
        )
    console.out.print(table)
    for result in outcome.results:
        _show_result(result, verbose)
    console.out.print(f"\n{summary}", markup=False)


def change_json(change: TensorChange) -> dict[str, Any]:
    return {**dataclasses.asdict(change), "delta": change.delta}


def _show_result(result: Result, verbose: bool) -> None:
    for problem in result.problems:
        console.out.print(f"\n[red]✗[/] [bold]{escape(result.name)}[/] {problem.rule}: {escape(problem.message)}")
    for note in result.notes:
        console.out.print(f"\n• {result.name}: {note}", markup=False)
    if result.changes:
        _changes(result.changes, len(result.changes) if verbose else _CHANGES_SHOWN)


def _changes(changes: Sequence[TensorChange], shown: int) -> None:
    table = _table("tensor", "was", "is", "change", "")
    for column in table.columns[1:4]:
        column.justify = "right"
    for change in changes[:shown]:
        table.add_row(
            escape(change.name),
            _size(None if change.before is None else change.before.nbytes),
            _size(None if change.after is None else change.after.nbytes),
            signed(change.delta),
            escape(change.what),
        )
    console.out.print(table)
    if len(changes) > shown:
        console.out.print(f"  and {len(changes) - shown} more", style="dim")


def _shares(label: str, shares: Sequence[Share], total: int) -> None:
    table = _table(label, "tensors", "bytes", "")
    for column in table.columns[1:]:
        column.justify = "right"
    for share in shares:
        table.add_row(escape(share.name), str(share.tensors), format_bytes(share.nbytes), _share(share.nbytes, total))
    console.out.print()
    console.out.print(table)


def _table(*columns: str, title: str | None = None, show_header: bool = True) -> Table:
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


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _size(count: int | None) -> str:
    return "" if count is None else format_bytes(count)
