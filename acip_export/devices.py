"""Devices by name: how much memory a model may take there, and what runs it fast. See docs/devices.md.

The table of the package is ``devices.toml``. Users add their own, in the same form: in the configuration directory, in
the file that the environment variable ``ACIP_EXPORT_DEVICES`` names, or with ``--devices FILE``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from acip_export.artifacts.plan import BudgetScope, Plan, Tokens
from acip_export.artifacts.speeds import RuntimeSpeed, load_speeds
from acip_export.choices import instead_of, nearest
from acip_export.errors import AcipError, DeviceFileError, SpeedsVersionError, UsageError
from acip_export.formats.registry import export_format, format_names
from acip_export.io.inputs import convert, decode_toml, read_input
from acip_export.machine import memory_bytes
from acip_export.units import parse_bytes

logger = logging.getLogger(__name__)

DEVICES_VARIABLE = "ACIP_EXPORT_DEVICES"
BUILT_IN = "built in"
# The machine that the command runs on, whatever it is.
THIS_MACHINE = "this"
_USABLE_HERE = Fraction(1, 2)

Text = Annotated[str, Meta(min_length=1, max_length=1000, pattern=r"\S")]


class Sources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where three figures of a device come from, and what its system enforces, in words or as addresses."""

    memory: Text
    usable: Text
    types: Text
    enforces: Text | None = None


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
    speeds: Text | None = None
    source: Sources


class DeviceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of devices."""

    device: Annotated[tuple[DeviceTable, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: phone, board, laptop, browser and so on.
        memory_bytes: all of it. usable: the share that one process can have.
        runtimes: what runs each format there; the first format is the default.
        types: weight types that are fast there, by format, most precise first.
        context: tokens that a plan is made for unless told otherwise.
        sources: where ``memory``, ``usable`` and ``types`` come from.
        largest_file: bytes of the largest file that can be loaded there; ``None``: any.
        whole_prompts: formats whose runtime there computes a prompt in one piece, however long it is.
        enforces: the scope of what its system ends processes for; ``None``: not known.
        speeds: the table that ``acip-export calibrate`` made there; ``None``: nobody has.
        defined_in: the file, or ``built in``.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int
    usable: Fraction
    runtimes: dict[str, str]
    types: dict[str, tuple[str, ...]]
    context: int
    sources: dict[str, str]
    largest_file: int | None = None
    whole_prompts: tuple[str, ...] = ()
    enforces: BudgetScope | None = None
    speeds: Path | None = None
    defined_in: str = BUILT_IN

    @property
    def budget_bytes(self) -> int:
        """What a model with its runtime may take."""
        return int(self.memory_bytes * self.usable)

    @property
    def default_format(self) -> str:
        return next(iter(self.runtimes))

    def obstacle(self, plan: Plan) -> str | None:
        """Say in a few words why an export cannot run here; ``None``: its process stays within the budget."""
        if plan.format not in self.runtimes:
            return f"no runtime for {plan.format}"
        if plan.process_bytes > self.budget_bytes:
            return "less memory"
        if self.largest_file is not None and max(plan.files.values()) > self.largest_file:
            return "no file as large"
        if plan.format in self.whole_prompts and plan.serving.prompt_batch < plan.serving.context:
            return "prompts in one piece, which it was not planned for"
        serving = plan.serving
        if plan.format in self.whole_prompts and not export_format(plan.format).made_by_programs(
            serving.cache_type_k, serving.cache_type_v
        ):
            return f"no KV cache of {serving.cache_types}"
        return None

    def slow_types(self, plan: Plan) -> tuple[str, ...]:
        """Return types of the export's matrices that are not among the fast ones here."""
        matrices = [tensor for tensor in plan.tensors if len(tensor.shape) == 2]
        used = {name for each in matrices for name in (each.type, each.up_type, each.down_type) if name is not None}
        return tuple(sorted(used - set(self.types.get(plan.format, used))))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "class": self.kind,
            "memory_bytes": self.memory_bytes,
            "usable": float(self.usable),
            "budget_bytes": self.budget_bytes,
            "runtimes": self.runtimes,
            "types": {format: list(types) for format, types in self.types.items()},
            "context": self.context,
            "largest_file": self.largest_file,
            "whole_prompts": list(self.whole_prompts),
            "enforces": self.enforces,
            "speeds": None if self.speeds is None else str(self.speeds),
            "source": self.sources,
            "defined_in": self.defined_in,
        }


def user_file() -> Path:
    """``devices.toml`` in the user's configuration directory; it need not exist."""
    if sys.platform == "win32":
        home = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "acip-export" / "devices.toml"


def speeds_file() -> Path:
    """``speeds.json`` beside the user's devices: what ``acip-export calibrate`` measured here; it need not exist."""
    return user_file().with_name("speeds.json")


def speeds_of(device: Device | None, needed: bool) -> Mapping[str, RuntimeSpeed]:
    """Return how fast runtimes are on a device; ``None``: on this machine. Empty: nobody has measured it.

    What another version of this tool measured on this machine is left out, with a warning, unless it is ``needed``:
    nobody named that file.

    Raises:
        DeviceFileError: the file that has it is missing or malformed.
    """
    if device is not None and device.name != THIS_MACHINE:
        return {} if device.speeds is None else load_speeds(device.speeds).runtimes
    if not speeds_file().is_file():
        return {}
    try:
        return load_speeds(speeds_file()).runtimes
    except SpeedsVersionError as reason:
        if needed:
            raise
        logger.warning("%s; until then plans for this machine predict no speed", reason)
        return {}


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """All devices by name: the package's, then those of the configuration directory, the environment and ``extra``.

    Raises:
        DeviceFileError: a file that was named is missing, or any file is malformed.
    """
    table = files("acip_export").joinpath("devices.toml").read_bytes()
    devices = {device.name: device for device in _parse(table, BUILT_IN)}
    named = os.environ.get(DEVICES_VARIABLE)
    found = [user_file()] if user_file().is_file() else []
    for file in (*found, *([Path(named)] if named else []), *([extra] if extra else [])):
        devices |= {device.name: device for device in _parse(read_input(file, DeviceFileError), str(file))}
    return devices


def find_device(name: str, devices: dict[str, Device]) -> Device:
    """Raises UsageError for an unknown name, with the closest known ones; ``this`` is the machine that this runs on."""
    if name.lower() in devices:
        return devices[name.lower()]
    if name.lower() == THIS_MACHINE:
        return this_machine()
    folded = name.lower().replace(" ", "-").replace("_", "-")
    close = nearest(folded, devices, 3, 0.4)
    whole = folded.replace("-", "")
    # Without the memory, which a short name like rpi5 does not mean.
    titles = {known: known.rpartition("-")[0].replace("-", "") or known for known in devices}
    short = [known for known, title in titles.items() if title[0] == whole[:1] and _in_order(whole, title)]
    close = [known for known in devices if whole in known.replace("-", "")][:3] or short[:3] or close
    hint = f"Did you mean  {'  or  '.join(close)}?" if close else "None is like it."
    raise UsageError(f"unknown device {name!r}. {hint}\nacip-export devices  lists all {len(devices)}")


def _in_order(letters: str, name: str) -> bool:
    """Whether ``name`` holds all letters, in order, as rpi5 stands for raspberry-pi-5."""
    rest = iter(name)
    return all(letter in rest for letter in letters)


def this_machine() -> Device:
    """Return the machine that this process runs on: all formats, all types, half of its memory."""
    return Device(
        name=THIS_MACHINE,
        title="This machine",
        kind="computer",
        memory_bytes=memory_bytes(),
        usable=_USABLE_HERE,
        runtimes={name: next(iter(export_format(name).runtimes)) for name in format_names()},
        types={},
        context=4096,
        sources={
            "memory": "what the system says, or the limit of the container",
            "usable": "estimate: half is left beside the system and other programs; say more with  --budget",
            "types": "all: which are fast here was not measured",
        },
        defined_in="this machine",
    )


def _parse(data: bytes, where: str) -> list[Device]:
    document = convert(decode_toml(data, where, DeviceFileError), DeviceFile, where, _expected)
    devices = [_device(table, f"{where}: $.device[{index}]", where) for index, table in enumerate(document.device)]
    names = [device.name for device in devices]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DeviceFileError(f"{where} has {twice[0]!r} twice")
    return devices


def _expected(message: str) -> DeviceFileError:
    return DeviceFileError(f"{message}\nA file of devices holds [[device]] tables, and only those; see docs/devices.md")


def _device(table: DeviceTable, place: str, where: str) -> Device:
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
    for field, formats in (("whole_prompts", table.whole_prompts), ("types", table.types)):
        if not set(formats) <= set(runtimes):
            raise DeviceFileError(f"{place}.{field} must be for formats of runtimes ({', '.join(runtimes)})")
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
        speeds=None if table.speeds is None else Path(where).parent / table.speeds,
        defined_in=where,
    )


def _bytes(quantity: str, place: str) -> int:
    try:
        return parse_bytes(quantity, place)
    except UsageError as reason:
        raise DeviceFileError(str(reason)) from reason
