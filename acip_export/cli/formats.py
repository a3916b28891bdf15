"""``acip-export formats``."""

from __future__ import annotations

from acip_export.cli import output as console
from acip_export.cli.options import Json
from acip_export.cli.tables.formats import show_formats
from acip_export.formats.targets import TARGETS
from acip_export.weight_types import types_of


def formats(json: Json = False) -> None:
    """List targets, layouts and weight types."""
    if not json:
        show_formats()
        return
    console.print_json(
        {
            name: {
                "layouts": [layout.name for layout in target.layouts],
                "runtimes": {runtime: list(layouts) for runtime, layouts in target.runtimes.items()},
                "cache_types": list(target.cache_types),
                "types": [
                    {"name": f.name, "bits_per_weight": f.bits_per_weight, "block": f.block} for f in types_of(name)
                ],
            }
            for name, target in TARGETS.items()
        }
    )
