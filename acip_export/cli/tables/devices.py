"""Print the known devices, or one with its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.markup import escape

from acip_export.artifacts.plan import Plan
from acip_export.cli import output as console
from acip_export.cli.tables.common import facts_table, plain_table
from acip_export.devices import BUILT_IN, Chip, Device
from acip_export.formats.registry import export_format
from acip_export.units import format_bytes, format_error, format_speed


def show_devices(known: list[Device]) -> None:
    table = plain_table("name", "class", "memory", "budget", "formats")
    table.columns[2].justify = table.columns[3].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for device in known:
        name = escape(device.name) if device.defined_in == BUILT_IN else f"{escape(device.name)} [dim](yours)[/]"
        memory = f"{device.memory_bytes / 2**30:g} GiB"
        table.add_row(name, escape(device.kind), memory, format_bytes(device.budget_bytes), ", ".join(device.runtimes))
    console.out.print(table)
    console.say("the rest of it, with sources:  acip-export devices NAME", style="dim")


def show_holders(plan: Plan, holding: Sequence[Device], obstacles: Sequence[str]) -> None:
    """What the export's process takes, the devices that have it, and why others cannot run it."""
    console.out.print(
        f"{plan.process_bytes:,} bytes planned for the process, {plan.serving.context:,} tokens of context"
    )
    table = plain_table("name", "budget", "left over", "slow types")
    table.columns[0].no_wrap = True
    table.columns[1].justify = table.columns[2].justify = "right"
    for device in holding:
        spare = format_bytes(device.budget_bytes - plan.process_bytes)
        slow = ", ".join(device.slow_types(plan))
        table.add_row(escape(device.name), format_bytes(device.budget_bytes), spare, escape(slow))
    if holding:
        console.out.print(table)
    reasons = [f"{count} {escape(why)}" for why, count in Counter(obstacles).most_common()]
    if reasons:
        console.say(f"not on {len(obstacles)} others: {'; '.join(reasons)}", style="dim")


def _types(device: Device, format_name: str) -> str:
    """Say which weight types plans for a device are limited to, and which of the format's own that leaves out."""
    fast = device.types.get(format_name)
    if fast is None:
        return "all types that plans take by default"
    left_out = [name for name in export_format(format_name).types if name not in fast]
    told = f"only types that are fast there: {', '.join(fast)}"
    return f"{told}; not {', '.join(left_out)}, unless --types names them" if left_out else told


def show_device(device: Device) -> None:
    table = facts_table(escape(device.title))
    budget, memory = (format_bytes(size) for size in (device.budget_bytes, device.memory_bytes))
    table.add_row("memory", memory, escape(device.sources["memory"]))
    table.add_row("usable", f"{float(device.usable):.0%}", escape(device.sources["usable"]))
    table.add_row("budget", budget, f"{device.budget_bytes:,} bytes for the model and its runtime")
    if device.enforces is not None:
        table.add_row("enforces", device.enforces, escape(device.sources["enforces"]))
    for index, (fmt, runtime) in enumerate(device.runtimes.items()):
        table.add_row(f"{fmt}{' (default)' if index == 0 else ''}", escape(runtime), escape(_types(device, fmt)))
    table.add_row("types", "", escape(device.sources["types"]))
    for row in _speeds(device):
        table.add_row(*row)
    table.add_row("context", str(device.context), "tokens, unless --context says otherwise or the model takes fewer")
    if device.largest_file is not None:
        table.add_row("largest file", format_bytes(device.largest_file), "that can be loaded there")
    table.add_row("defined in", escape(device.defined_in), "")
    console.out.print(table)
    if device.chip is not None:
        _show_reports(device.chip)
    console.say(f"next:  acip-export plan --device {device.name}")


def _speeds(device: Device) -> Iterator[tuple[str, str, str]]:
    """Say what plans predict tokens a second with."""
    if device.speeds is not None:
        yield "speed", "measured", f"{escape(str(device.speeds))}, by  acip-export calibrate"
        return
    if device.chip is None:
        yield "speed", "not known", "acip-export calibrate  measures it there; or list reports of it, docs/devices.md"
        return
    for runtime, speeds in device.reported_speeds().items():
        told = f"of {escape(device.chip.title)}; predictions: answers {format_error(speeds.answer_error)}"
        told += f", prompts {format_error(speeds.prompt_error)}" if speeds.prompts else ""
        told += f"; further off for models of fewer than {speeds.smallest / 1e6:,.0f} million numbers"
        source = device.sources.get("chip")
        yield f"speed in {runtime}", "reported", told if source is None else f"{told}; {escape(source)}"


def _show_reports(chip: Chip) -> None:
    """Print what was measured, and below it where each speed is from."""
    table = plain_table("model", "type", "size", "prompt", "answer", "source")
    for column in table.columns[2:]:
        column.justify = "right"
    numbers: dict[str, int] = {}
    for each in chip.reports:
        number = numbers.setdefault(each.source, len(numbers) + 1)
        prompt, answer = ("" if speed is None else format_speed(speed) for speed in (each.prompt, each.answer))
        size = format_bytes(each.nbytes)
        table.add_row(escape(each.model.name), each.type.name, size, prompt, answer, str(number))
    console.out.print("\nReported, in tokens a second")
    console.out.print(table)
    sources = plain_table("", "source")
    for source, number in numbers.items():
        sources.add_row(str(number), escape(source))
    console.out.print(sources)
