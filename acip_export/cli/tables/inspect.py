"""Print where the bytes of a model are, and what differs between two."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from acip_export.check.compare import signed
from acip_export.cli import output as console
from acip_export.cli.tables.common import plain_table, show_changes
from acip_export.inspection import Anatomy, TensorChange
from acip_export.inspection.anatomy import Share
from acip_export.inspection.diff import extents
from acip_export.units import format_bytes, format_nats

if TYPE_CHECKING:
    from acip_export.report.listing import Listed

_STATES = {
    "verified": "verified",
    "failed": "[red]failed[/]",
    "not verified": "not verified",
    "unreadable": "[red]unreadable[/]",
}


def show_anatomy(anatomy: Anatomy, top: int) -> None:
    """Totals, then bytes by file and type, then the ``top`` largest layer groups and tensors."""
    table = plain_table(title=f"{escape(anatomy.path)} ({anatomy.kind})", show_header=False)
    table.add_column(style="dim", overflow="fold")
    table.add_column(justify="right")
    table.add_column(justify="right")
    total = anatomy.total_bytes
    table.add_row("total", format_bytes(total), f"{total:,} bytes")
    table.add_row("tensors", format_bytes(anatomy.tensor_bytes), _share(anatomy.tensor_bytes, total))
    table.add_row("everything else", format_bytes(anatomy.overhead_bytes), _share(anatomy.overhead_bytes, total))
    if len(anatomy.files) > 1:
        table.add_row(f"in {len(anatomy.files)} files")
        for name, size in sorted(anatomy.files.items(), key=lambda item: -item[1]):
            # Not blanks before it: of a name that is folded, the other lines are indented as well.
            listed = Padding(Text(name, overflow="fold"), (0, 0, 0, 2))
            table.add_row(listed, format_bytes(size), _share(size, total))
    console.out.print(table)
    _shares("type", anatomy.by_type(), anatomy.tensor_bytes)
    if top:
        _shares("layers", anatomy.by_group(), anatomy.tensor_bytes, top)
    if top and anatomy.tensors:
        largest = plain_table("largest tensors", "shape", "type", "bytes")
        largest.columns[-1].justify = "right"
        for tensor in anatomy.largest(top):
            largest.add_row(
                escape(tensor.name), extents(tensor.shape), escape(tensor.type), format_bytes(tensor.nbytes)
            )
        console.out.print()
        console.out.print(largest)
    if anatomy.facts:
        facts = plain_table("metadata", "")
        for key, value in anatomy.facts.items():
            facts.add_row(escape(key), escape(value))
        console.out.print()
        console.out.print(facts)


def show_exports(listed: Sequence[Listed]) -> None:
    """One row each, and how to look into one of them."""
    known = any(each.mean_kl is not None for each in listed)
    table = plain_table("export", "format", "bytes", "state", *(["KL to dense"] if known else []))
    table.columns[2].justify = table.columns[-1].justify = "right"
    table.columns[3].justify = "left"
    for column in table.columns[1:]:
        column.no_wrap = True
    for each in listed:
        kl, form, nbytes = each.mean_kl, "", ""
        if each.export is not None:
            plan, written = each.export.plan, each.written_bytes
            form = f"{plan.format} {plan.layout}"
            nbytes = f"{written:,}" + ("" if written == plan.planned_bytes else " [red]not as planned[/]")
        table.add_row(
            escape(each.directory.name),
            form,
            nbytes,
            _STATES[each.state],
            *([] if not known else ["" if kl is None else format_nats(kl)]),
        )
    console.out.print(table)
    if known:
        console.say("KL in nats per token, on the texts of their reports", style="dim")
    for each in listed:
        if each.problem:
            console.say(each.problem)
    console.say("One of them:")
    console.show_command(shlex.join(["acip-export", "inspect", str(_shown(listed).directory)]), shell=True)


def _shown(listed: Sequence[Listed]) -> Listed:
    """Return the first that can be looked into."""
    return next((each for each in listed if each.export is not None), listed[0])


def show_difference(before: Anatomy, after: Anatomy, changes: Sequence[TensorChange], top: int) -> None:
    """Totals of both, and the ``top`` largest changes."""
    table = plain_table("", "was", "is", "change")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, was, now in (
        ("total", before.total_bytes, after.total_bytes),
        ("tensors", before.tensor_bytes, after.tensor_bytes),
        ("everything else", before.overhead_bytes, after.overhead_bytes),
    ):
        table.add_row(label, format_bytes(was), format_bytes(now), signed(now - was, was))
    console.say(f"{before.path} → {after.path}")
    console.out.print(table)
    console.out.print()
    if changes:
        show_changes(changes, top)
    else:
        console.out.print(f"all {len(after.tensors)} tensors are stored alike")


def change_json(change: TensorChange) -> dict[str, Any]:
    return {**dataclasses.asdict(change), "delta": change.delta}


def _shares(label: str, shares: Sequence[Share], total: int, most: int | None = None) -> None:
    """One row each, the largest first; of all beyond ``most`` the sum."""
    table = plain_table(label, "tensors", "bytes", "")
    for column in table.columns[1:]:
        column.justify = "right"
    for share in shares[:most]:
        table.add_row(escape(share.name), str(share.tensors), format_bytes(share.nbytes), _share(share.nbytes, total))
    rest = [] if most is None else shares[most:]
    if rest:
        tensors, nbytes = sum(share.tensors for share in rest), sum(share.nbytes for share in rest)
        table.add_row(f"{len(rest)} more", str(tensors), format_bytes(nbytes), _share(nbytes, total), style="dim")
    console.out.print()
    console.out.print(table)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
