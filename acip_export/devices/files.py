"""Read files of devices: TOML with ``[[device]]`` tables, and the chips and models that their speeds come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from acip_export.artifacts.plan import BudgetScope, Tokens
from acip_export.choices import instead_of
from acip_export.devices.device import Device
from acip_export.devices.reports import Chip, KnownModel, SpeedReport
from acip_export.errors import AcipError, DeviceFileError, UsageError
from acip_export.formats.registry import export_format, export_formats, format_names
from acip_export.io.inputs import Positive, convert, decode_toml
from acip_export.units import parse_bytes

Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"\S")]


class Sources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the figures of a device come from, in words or as addresses."""

    memory: Text
    usable: Text
    types: Text
    enforces: Text | None = None
    chip: Text | None = None


class DeviceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A ``[[device]]`` as it is written down; see :class:`Device`."""

    name: Text
    title: Text
    kind: Text = msgspec.field(name="class")
    memory: Text
    usable: Annotated[float, Meta(gt=0, le=1)]
    runtimes: Annotated[dict[Text, Text], Meta(min_length=1)]
    types: dict[Text, Annotated[tuple[Text, ...], Meta(min_length=1)]] = {}
    context: Tokens = 4096
    largest_file: Text | None = None
    whole_prompts: tuple[Text, ...] = ()
    enforces: BudgetScope | None = None
    chip: Text | None = None
    speeds: Text | None = None
    source: Sources


class ModelTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``[[model]]`` as it is written down; see :class:`KnownModel`."""

    name: Text
    weights: Positive
    layers: Positive
    source: Text


# Tokens a second: from one in a quarter of an hour to ten million.
_Speed = Annotated[float, Meta(ge=1e-3, le=1e7)]


class ReportTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One of the ``reports`` of a chip as it is written down; see :class:`SpeedReport`."""

    runtime: Text
    model: Text
    type: Text
    size: Text
    prompt: _Speed | None = None
    answer: _Speed | None = None
    source: Text


class ChipTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``[[chip]]`` as it is written down; see :class:`Chip`."""

    name: Text
    title: Text
    reports: Annotated[tuple[ReportTable, ...], Meta(min_length=1)]


class DeviceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of devices."""

    device: tuple[DeviceTable, ...] = ()
    chip: tuple[ChipTable, ...] = ()
    model: tuple[ModelTable, ...] = ()


@dataclass(frozen=True)
class Known:
    """What files of devices define, by name; a later one replaces what has the same name."""

    devices: Mapping[str, Device] = field(default_factory=dict)
    chips: Mapping[str, Chip] = field(default_factory=dict)
    models: Mapping[str, KnownModel] = field(default_factory=dict)


def parse_devices(data: bytes, where: str, known: Known) -> Known:
    """Add what a file defines to what is known, which it may name.

    Raises:
        DeviceFileError: it is malformed, or names what is not known.
    """
    document = convert(decode_toml(data, where, DeviceFileError), DeviceFile, where, _expected)
    tables: Mapping[str, Sequence[DeviceTable | ChipTable | ModelTable]] = {
        "device": document.device,
        "chip": document.chip,
        "model": document.model,
    }
    if not any(tables.values()):
        raise _expected(f"{where} is empty")
    for kind, listed in tables.items():
        names = [table.name for table in listed]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DeviceFileError(f"{where} has the {kind} {twice[0]!r} twice")
    models = {**known.models, **{each.name: KnownModel(**msgspec.structs.asdict(each)) for each in document.model}}
    chips = dict(known.chips)
    for index, chip in enumerate(document.chip):
        chips[chip.name] = _chip(chip, f"{where}: $.chip[{index}]", models)
    devices = {name: _with_chip_of(device, chips) for name, device in known.devices.items()}
    for index, device in enumerate(document.device):
        devices[device.name] = _device(device, f"{where}: $.device[{index}]", where, chips)
    return Known(devices, chips, models)


def _with_chip_of(device: Device, chips: Mapping[str, Chip]) -> Device:
    """Return a device of an earlier file with the chip that its name means now."""
    return device if device.chip is None else replace(device, chip=chips[device.chip.name])


def _expected(message: str) -> DeviceFileError:
    told = "A file of devices holds [[device]], [[chip]] and [[model]] tables, and only those; see docs/devices.md"
    return DeviceFileError(f"{message}\n{told}")


def _chip(table: ChipTable, place: str, models: Mapping[str, KnownModel]) -> Chip:
    reports = [_report(each, f"{place}.reports[{index}]", models) for index, each in enumerate(table.reports)]
    for runtime in dict.fromkeys(report.runtime for report in reports):
        if not any(report.answer for report in reports if report.runtime == runtime):
            raise DeviceFileError(f"{place}.reports: none of {runtime} has the speed of an answer")
    return Chip(table.name, table.title, tuple(reports))


def _report(table: ReportTable, place: str, models: Mapping[str, KnownModel]) -> SpeedReport:
    formats = {runtime: format for format in export_formats() for runtime in format.timed_runtimes}
    if table.runtime not in formats:
        told = instead_of(table.runtime, list(formats), "known")
        raise DeviceFileError(f"{place}.runtime: unknown runtime {table.runtime!r}; {told}")
    if table.model not in models:
        told = instead_of(table.model, list(models), "known")
        raise DeviceFileError(f"{place}.model: no [[model]] has the name {table.model!r}; {told}")
    try:
        weight_type = formats[table.runtime].type(table.type)
    except KeyError:
        known = [each.name for each in formats[table.runtime].weight_types]
        raise DeviceFileError(
            f"{place}.type: {formats[table.runtime].name} has no type {table.type!r}; "
            f"{instead_of(table.type, known, 'known')}"
        ) from None
    size = _bytes(table.size, f"{place}.size")
    return SpeedReport(table.runtime, models[table.model], weight_type, size, table.prompt, table.answer, table.source)


def _device(table: DeviceTable, place: str, where: str, chips: Mapping[str, Chip]) -> Device:
    runtimes = table.runtimes
    for name, runtime in runtimes.items():
        if name not in format_names():
            raise DeviceFileError(f"{place}: unknown format {name!r}; {instead_of(name, format_names(), 'known')}")
        known = export_format(name).runtimes
        if runtime not in known:
            raise DeviceFileError(
                f"{place}: unknown runtime {runtime!r} of {name}; {instead_of(runtime, known, 'known')}"
            )
    if (table.enforces is None) != (table.source.enforces is None):
        raise DeviceFileError(f"{place}: enforces and source.enforces are given together, or neither")
    if table.chip is not None and table.chip not in chips:
        told = instead_of(table.chip, list(chips), "known")
        raise DeviceFileError(f"{place}.chip: no [[chip]] has the name {table.chip!r}; {told}")
    for named, formats in (("whole_prompts", table.whole_prompts), ("types", table.types)):
        if not set(formats) <= set(runtimes):
            raise DeviceFileError(f"{place}.{named} must be for formats of runtimes ({', '.join(runtimes)})")
    for name, types in table.types.items():
        try:
            export_format(name).choose_types(types)
        except AcipError as reason:
            raise DeviceFileError(f"{place}.types.{name}: {reason}") from reason
    return Device(
        name=table.name,
        title=table.title,
        kind=table.kind,
        memory_bytes=_bytes(table.memory, f"{place}.memory"),
        usable=Fraction(str(table.usable)),
        runtimes=dict(runtimes),
        types=dict(table.types),
        context=table.context,
        sources={what: source for what, source in msgspec.structs.asdict(table.source).items() if source},
        largest_file=None if table.largest_file is None else _bytes(table.largest_file, f"{place}.largest_file"),
        whole_prompts=table.whole_prompts,
        enforces=table.enforces,
        chip=None if table.chip is None else chips[table.chip],
        speeds=None if table.speeds is None else Path(where).parent / table.speeds,
        defined_in=where,
    )


def _bytes(quantity: str, place: str) -> int:
    try:
        return parse_bytes(quantity, place)
    except UsageError as reason:
        raise DeviceFileError(str(reason)) from reason
