"""``acip-export formats``."""

from __future__ import annotations

from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Quiet
from acip_export.cli.tables.formats import show_formats, show_overview
from acip_export.formats.registry import export_format, export_formats


def formats(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All that is known of every format.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the installed formats with their layouts, runtimes, backends, options and types.

    acip-export formats

    acip-export formats gguf
    """
    shown = tuple(export_formats()) if name is None else (export_format(name.lower()),)
    if not json:
        (show_formats if all_ or name is not None else show_overview)(shown)
        return
    console.print_json(
        {
            known.name: {
                "layouts": [layout.name for layout in known.layouts],
                "runtimes": {runtime: list(layouts) for runtime, layouts in known.runtimes.items()},
                "backends": list(known.backend_names),
                "cache_types": list(known.cache_types),
                "options": {option.flag: " ".join(option.help.split()) for option in known.options},
                "types": [
                    {
                        "name": t.name,
                        "bits_per_weight": t.bits_per_weight,
                        "block": t.block,
                        "refused": known.refused.get(t.name),
                    }
                    for t in known.weight_types
                ],
            }
            for known in shown
        }
    )
