"""``acip-export formats``."""

from __future__ import annotations

from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Quiet
from acip_export.cli.tables.formats import show_formats
from acip_export.formats.registry import export_formats


def formats(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the installed formats with their layouts, runtimes, backends, options and types."""
    if not json:
        show_formats()
        return
    console.print_json(
        {
            known.name: {
                "layouts": [layout.name for layout in known.layouts],
                "runtimes": {runtime: list(layouts) for runtime, layouts in known.runtimes.items()},
                "backends": [backend.name for backend in known.backends],
                "cache_types": list(known.cache_types),
                "options": {option.flag: " ".join(option.help.split()) for option in known.options},
                "types": [
                    {"name": t.name, "bits_per_weight": t.bits_per_weight, "block": t.block} for t in known.weight_types
                ],
            }
            for known in export_formats()
        }
    )
