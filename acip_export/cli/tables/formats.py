"""Print the formats with their layouts, runtimes and types."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table

from acip_export.cli import output as console
from acip_export.cli.tables.common import plain_table
from acip_export.formats.protocol import AUTO, DEFAULT_BACKEND, ExportFormat

# Types in a row of the overview.
_MOST_SHOWN = 6


def _use(known: ExportFormat, name: str) -> str:
    if name in known.types:
        return "default"
    if name in known.narrow_types:
        return "where 256 does not fit"
    return "refused" if name in known.refused else ""


def show_overview(formats: Sequence[ExportFormat]) -> None:
    """Formats with the names that flags take, on one screen: types by bits, those of plans first."""
    for known in formats:
        console.say(f"{known.name}  {known.description}", style="bold")
        names: dict[str, Iterable[str]] = {
            "layouts": (*(layout.name for layout in known.layouts), AUTO),
            "runtimes": known.runtimes,
            "backends": known.backend_names,
            "KV cache": (*known.cache_types, "; ".join((AUTO, *_caches_of_backends(known)))),
            "options": (option.flag for option in known.options),
        }
        table = Table.grid(padding=(0, 2))
        for what, listed in names.items():
            if text := ", ".join(listed):
                table.add_row(f"  {what}", text)
        console.out.print(table)
        console.out.print(_types_by_bits(known))
    example = formats[0].name if formats else "NAME"
    console.say(f"with bytes, errors and what is refused:  acip-export formats {example},  or --all", style="dim")


def _caches_of_backends(known: ExportFormat) -> Iterator[str]:
    """Name the types of KV cache of backends that have others than the default one."""
    by_types: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for backend in known.backends:
        if (types := tuple(backend.cache_types)) != tuple(known.cache_types):
            by_types[types].append(backend.name)
    for types, backends in by_types.items():
        yield f"of {', '.join(backends)}: {', '.join(types)}"


def _types_by_bits(known: ExportFormat) -> Table:
    rows: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for each in known.weight_types:
        bits = re.search(r"\d+", each.name)
        by_default, others = rows[int(bits[0]) if bits else int(each.bits_per_weight)]
        if _use(known, each.name) != "refused":
            (by_default if each.name in known.types else others).append(each.name)
    table = plain_table("  bits", "types by default", "with --types")
    for width in sorted(rows, reverse=True):
        by_default, others = rows[width]
        more = len(others) - _MOST_SHOWN
        shown = [*others[:_MOST_SHOWN], f"{more} more"] if more > 1 else others
        table.add_row(f"  {width}", ", ".join(by_default), ", ".join(shown))
    return table


def show_formats(formats: Sequence[ExportFormat]) -> None:
    """Formats with all that is known of their layouts and types."""
    for known in formats:
        console.say(f"{known.name}  {known.description}; KV cache: {', '.join(known.cache_types)}", style="bold")
        for layout in known.layouts:
            console.say(f"layout {layout.name}: {layout.description}", indent=2)
        for runtime, layouts in known.runtimes.items():
            console.say(f"runtime {runtime}: {', '.join(layouts)}", indent=2)
        if known.backends:
            console.say(f"backend {DEFAULT_BACKEND}: the default; what is listed below is its own", indent=2)
        for backend in known.backends:
            cache = ", ".join(backend.cache_types)
            console.say(f"backend {backend.name}: {backend.description}; KV cache: {cache}", indent=2)
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
