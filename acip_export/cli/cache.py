"""``acip-export cache``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from acip_export.choices import instead_of
from acip_export.cli import output as console
from acip_export.cli.options import Cache, Debug, Json, Quiet
from acip_export.cli.tables.common import facts_table
from acip_export.errors import UsageError
from acip_export.io.caches import Kept, find_caches
from acip_export.units import format_bytes


def cache(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove those named, or all that commands make again.")
    ] = False,
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="DIR", help="Model directory. Default: here.")
    ] = Path(),
    cache: Cache = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List what is kept to save time, with its bytes, or remove it.

    Each says what making it again takes. Without names, --clear removes what commands make again by themselves; the
    rest is removed by name alone.

    acip-export cache

    acip-export cache --clear

    acip-export cache --clear graphs
    """
    known = find_caches(model, cache)
    unknown = set(names or ()) - {each.name for each in known}
    if unknown:
        there = instead_of(min(unknown), [each.name for each in known] or ["nothing"], "there is")
        raise UsageError(f"nothing is kept as {min(unknown)!r}; {there}")
    chosen = [each for each in known if (each.name in names if names else not (clear and each.by_hand))]
    sizes = {each.name: each.nbytes for each in known}
    if clear:
        for each in chosen:
            each.remove()
    total, left = sum(sizes[each.name] for each in chosen), [each for each in known if clear and each not in chosen]
    if json:
        console.print_json(
            {
                "cleared": clear,
                "caches": [_told(each, sizes[each.name]) for each in chosen],
                "bytes": total,
                "left": [_told(each, sizes[each.name]) for each in left],
            }
        )
        return
    table = facts_table()
    for each in chosen:
        made_with = f" (made with  {each.made_with})" if each.made_with else ""
        table.add_row(each.name, format_bytes(sizes[each.name]), f"{each.purpose}{made_with}")
    if chosen:
        console.out.print(table)
    if clear:
        console.say(f"{format_bytes(total)} removed")
        by_hand = [each for each in left if each.by_hand]
        if by_hand and not names:
            listed = ", ".join(f"{each.name} ({format_bytes(sizes[each.name])})" for each in by_hand)
            command = " ".join(("acip-export cache --clear", *(quote(each.name) for each in by_hand)))
            console.say(f"left, as no command makes it again: {listed}; to remove it, too:  {command}")
        return
    others = ",  the rest with  acip-export cache --clear NAME" if any(each.by_hand for each in chosen) else ""
    console.say(f"{format_bytes(total)} kept; remove what commands make again with  acip-export cache --clear{others}")


def _told(kept: Kept, size: int) -> dict[str, Any]:
    return {
        "name": kept.name,
        "purpose": kept.purpose,
        "places": list(map(str, kept.places)),
        "bytes": size,
        "made_with": kept.made_with,
    }
