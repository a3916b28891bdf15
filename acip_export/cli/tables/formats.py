"""Print the formats with their layouts, runtimes and types."""

from __future__ import annotations

from rich.table import Table

from acip_export.cli import output as console
from acip_export.formats.protocol import ExportFormat
from acip_export.formats.registry import export_formats


def _use(known: ExportFormat, name: str) -> str:
    if name in known.types:
        return "default"
    if name in known.narrow_types:
        return "default for rows that larger blocks do not fit"
    return "refused" if name in known.refused else ""


def show_formats() -> None:
    """Formats with their layouts and types."""
    for known in export_formats():
        console.out.print(f"[bold]{known.name}[/]  {known.description}; KV cache: {', '.join(known.cache_types)}")
        for layout in known.layouts:
            console.out.print(f"  layout {layout.name}: {layout.description}", markup=False)
        for runtime, layouts in known.runtimes.items():
            console.out.print(f"  runtime {runtime}: {', '.join(layouts)}", markup=False)
        for backend in known.backends:
            console.out.print(f"  backend {backend.name}: {backend.description}", markup=False)
        for option in known.options:
            console.out.print(f"  option {option.flag}: {option.help}", markup=False)
        table = Table(
            "type", "bits/weight", "block", "rounding error", "", box=None, padding=(0, 2), header_style="dim"
        )
        for f in known.weight_types:
            table.add_row(
                f.name, f"{f.bits_per_weight:.3f}", str(f.block), f"{f.relative_mse**0.5:.4f}", _use(known, f.name)
            )
        console.out.print(table)
