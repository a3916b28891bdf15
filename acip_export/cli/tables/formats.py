"""Print the formats with their layouts, runtimes and types."""

from __future__ import annotations

from collections.abc import Sequence

from acip_export.cli import output as console
from acip_export.cli.tables.common import plain_table
from acip_export.formats.protocol import ExportFormat


def _use(known: ExportFormat, name: str) -> str:
    if name in known.types:
        return "default"
    if name in known.narrow_types:
        return "where 256 does not fit"
    return "refused" if name in known.refused else ""


def show_formats(formats: Sequence[ExportFormat]) -> None:
    """Formats with their layouts and types."""
    for known in formats:
        console.say(f"{known.name}  {known.description}; KV cache: {', '.join(known.cache_types)}", style="bold")
        for layout in known.layouts:
            console.say(f"layout {layout.name}: {layout.description}", indent=2)
        for runtime, layouts in known.runtimes.items():
            console.say(f"runtime {runtime}: {', '.join(layouts)}", indent=2)
        for backend in known.backends:
            console.say(f"backend {backend.name}: {backend.description}", indent=2)
        for option in known.options:
            console.say(f"option {option.flag}: {' '.join(option.help.split())}", indent=2)
        table = plain_table("type", "bits/weight", "block", "rounding error", "")
        for f in known.weight_types:
            table.add_row(
                f.name, f"{f.bits_per_weight:.3f}", str(f.block), f"{f.relative_mse**0.5:.4f}", _use(known, f.name)
            )
        console.out.print(table)
        for reason in dict.fromkeys(known.refused.values()):
            types = [name for name, why in known.refused.items() if why == reason]
            console.say(f"refused: {', '.join(types)}: {reason}", indent=2)
