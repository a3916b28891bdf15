"""``acip-export cache``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.choices import instead_of
from acip_export.cli import output as console
from acip_export.cli.options import Cache, Debug, Json, Quiet
from acip_export.cli.tables.common import facts_table
from acip_export.errors import UsageError
from acip_export.io.caches import find_caches
from acip_export.units import format_bytes


def cache(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove them; all are made again when needed.")] = False,
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="DIR", help="Model directory. Default: here.")
    ] = Path(),
    cache: Cache = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List what is kept to save time, with its bytes, or remove it.

    acip-export cache

    acip-export cache --clear graphs
    """
    known = find_caches(model, cache)
    unknown = set(names or ()) - {each.name for each in known}
    if unknown:
        there = instead_of(min(unknown), [each.name for each in known] or ["nothing"], "there is")
        raise UsageError(f"nothing is kept as {min(unknown)!r}; {there}")
    chosen = [each for each in known if not names or each.name in names]
    sizes = [each.nbytes for each in chosen]
    if clear:
        for each in chosen:
            each.remove()
    if json:
        told = [
            {"name": each.name, "purpose": each.purpose, "places": list(map(str, each.places)), "bytes": size}
            for each, size in zip(chosen, sizes, strict=True)
        ]
        console.print_json({"cleared": clear, "caches": told, "bytes": sum(sizes)})
        return
    table = facts_table()
    for each, size in zip(chosen, sizes, strict=True):
        table.add_row(each.name, format_bytes(size), each.purpose)
    if chosen:
        console.out.print(table)
    console.say(f"{format_bytes(sum(sizes))} {'removed' if clear else 'kept; remove with  acip-export cache --clear'}")
