"""Print the outcome of a check."""

from __future__ import annotations

from rich.markup import escape

from acip_export.check.compare import Result
from acip_export.check.run import Outcome
from acip_export.cli import output as console
from acip_export.cli.tables.common import plain_table, show_changes, size_text

_CHANGES_SHOWN = 5
_STATUS = {"ok": "[green]ok[/]", "failed": "[bold red]failed[/]", "skipped": "[yellow]skipped[/]"}


def show_check(outcome: Outcome, summary: str, verbose: bool) -> None:
    """One row an entry, what failed and why, and the tensors that changed."""
    table = plain_table("", "check", "size", "baseline", "change", "limit", "quality kept")
    for column in table.columns[2:]:
        column.justify = "right"
    for result in outcome.results:
        table.add_row(
            _STATUS[result.status],
            escape(result.name),
            size_text(result.total_bytes),
            size_text(result.baseline_bytes),
            result.change,
            size_text(result.limit_bytes),
            "" if result.recovery is None else f"{result.recovery:.2%}",
        )
    console.out.print(table)
    for result in outcome.results:
        _show_result(result, verbose)
    console.say(f"\n{summary}")


def _show_result(result: Result, verbose: bool) -> None:
    for problem in result.problems:
        told = f"\n[red]✗[/] [bold]{escape(result.name)}[/] {problem.rule}: {escape(problem.message)}"
        console.say(told, markup=True)
    for note in result.notes:
        console.say(f"\n• {result.name}: {note}")
    if result.changes:
        show_changes(result.changes, len(result.changes) if verbose else _CHANGES_SHOWN)
