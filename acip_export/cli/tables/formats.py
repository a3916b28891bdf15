"""Print the formats with their layouts, runtimes and types."""

from __future__ import annotations

from rich.table import Table

from acip_export.cli import output as console
from acip_export.formats.targets import TARGETS
from acip_export.weight_types import types_of


def show_formats() -> None:
    """Targets with their layouts and types."""
    for name, target in TARGETS.items():
        console.out.print(f"[bold]{name}[/]  KV cache: {', '.join(target.cache_types)}")
        for layout in target.layouts:
            console.out.print(f"  layout {layout.name}: {layout.description}", markup=False)
        for runtime, layouts in target.runtimes.items():
            console.out.print(f"  runtime {runtime}: {', '.join(layouts)}", markup=False)
        table = Table(
            "type", "bits/weight", "block", "rounding error", "", box=None, padding=(0, 2), header_style="dim"
        )
        for f in types_of(name):
            default = "default" if f.name in target.types else "refused" if f.name in target.refused else ""
            table.add_row(f.name, f"{f.bits_per_weight:.3f}", str(f.block), f"{f.relative_mse**0.5:.4f}", default)
        console.out.print(table)
