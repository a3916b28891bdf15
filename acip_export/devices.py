"""Devices by name: how much memory a model may take there, and what runs it fast. See docs/devices.md.

The table of the package is ``devices.toml``. Users add their own, in the same form: in the configuration directory, in
the file that the environment variable ``ACIP_EXPORT_DEVICES`` names, or with ``--devices FILE``.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any

from acip_export.errors import AcipError, DeviceFileError, UsageError
from acip_export.formats.registry import export_format, format_names
from acip_export.units import parse_bytes

DEVICES_VARIABLE = "ACIP_EXPORT_DEVICES"
BUILT_IN = "built in"

_SOURCES = ("memory", "usable", "types")
_OPTIONAL = {"types", "context", "largest_file", "whole_prompts"}
_FIELDS = {"name", "title", "class", "memory", "usable", "runtimes", "source"} | _OPTIONAL


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
    defined_in: str = BUILT_IN

    @property
    def budget_bytes(self) -> int:
        """What a model with its runtime may take."""
        return int(self.memory_bytes * self.usable)

    @property
    def default_format(self) -> str:
        return next(iter(self.runtimes))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "class": self.kind,
            "memory_bytes": self.memory_bytes,
            "usable": float(self.usable),
            "budget_bytes": self.budget_bytes,
            "runtimes": self.runtimes,
            "types": {target: list(types) for target, types in self.types.items()},
            "context": self.context,
            "largest_file": self.largest_file,
            "whole_prompts": list(self.whole_prompts),
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


def load_devices(extra: Path | None = None) -> dict[str, Device]:
    """All devices by name: the package's, then those of the configuration directory, the environment and ``extra``.

    Raises:
        DeviceFileError: a file that was named is missing, or any file is malformed.
    """
    table = files("acip_export").joinpath("devices.toml").read_text(encoding="utf-8")
    devices = {device.name: device for device in _parse(table, BUILT_IN)}
    named = os.environ.get(DEVICES_VARIABLE)
    found = [user_file()] if user_file().is_file() else []
    for file in (*found, *([Path(named)] if named else []), *([extra] if extra else [])):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as reason:
            raise DeviceFileError(f"the device file {file} cannot be read: {reason}") from reason
        devices |= {device.name: device for device in _parse(text, str(file))}
    return devices


def find_device(name: str, devices: dict[str, Device]) -> Device:
    """Raises UsageError for an unknown name, with the closest known ones."""
    if name in devices:
        return devices[name]
    folded = name.lower().replace(" ", "-").replace("_", "-")
    close = get_close_matches(folded, devices, n=3, cutoff=0.4)
    close = [known for known in devices if folded in known][:3] or close
    hint = f"Did you mean  {'  or  '.join(close)}?" if close else "None is like it."
    raise UsageError(f"unknown device {name!r}. {hint}\nacip-export devices  lists all {len(devices)}")


def _parse(text: str, where: str) -> list[Device]:
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as reason:
        raise DeviceFileError(f"{where} is not TOML: {reason}") from reason
    unknown = set(data) - {"device"}
    entries = data.get("device")
    if unknown or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DeviceFileError(f"{where} must hold [[device]] tables and nothing else; found: {', '.join(data) or '-'}")
    devices = [_device(entry, number, where) for number, entry in enumerate(entries, 1)]
    names = [device.name for device in devices]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DeviceFileError(f"{where} has {twice[0]!r} twice")
    return devices


def _device(entry: dict[str, Any], number: int, where: str) -> Device:
    label = f"{where}: device {entry.get('name') or number!r}"

    def fail(message: str) -> DeviceFileError:
        return DeviceFileError(f"{label}: {message}")

    unknown, missing = set(entry) - _FIELDS, _FIELDS - _OPTIONAL - set(entry)
    if unknown:
        raise fail(f"unknown field {sorted(unknown)[0]!r}; known: {', '.join(sorted(_FIELDS))}")
    if missing:
        raise fail(f"{', '.join(sorted(missing))} missing")
    for field in ("name", "title", "class", "memory"):
        if not isinstance(entry[field], str) or not entry[field].strip():
            raise fail(f"{field} must be text, found {entry[field]!r}")
    largest = entry.get("largest_file")
    if largest is not None and not isinstance(largest, str):
        raise fail(f"largest_file must be text, found {largest!r}")
    try:
        memory = parse_bytes(entry["memory"], "memory")
        largest_file = None if largest is None else parse_bytes(largest, "largest_file")
    except AcipError as reason:
        raise fail(str(reason)) from reason
    usable = entry["usable"]
    if isinstance(usable, bool) or not isinstance(usable, int | float) or not 0 < usable <= 1:
        raise fail(f"usable must be a share between 0 and 1, found {usable!r}")
    context = entry.get("context", 4096)
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise fail(f"context must be a number of tokens, found {context!r}")
    runtimes, sources = entry["runtimes"], entry["source"]
    if not isinstance(runtimes, dict) or not runtimes or not all(isinstance(r, str) for r in runtimes.values()):
        raise fail('runtimes must name what runs each format, for example { gguf = "llama.cpp" }')
    for name, runtime in runtimes.items():
        if name not in format_names():
            raise fail(f"unknown format {name!r}; known: {', '.join(format_names())}")
        known = export_format(name).runtimes
        if runtime not in known:
            raise fail(f"unknown runtime {runtime!r} of {name}; known: {', '.join(known)}")
    whole = entry.get("whole_prompts", [])
    if not isinstance(whole, list) or not set(map(str, whole)) <= set(runtimes):
        raise fail(f"whole_prompts must list formats of runtimes ({', '.join(runtimes)}), found {whole!r}")
    if not isinstance(sources, dict) or sorted(sources) != sorted(_SOURCES) or not all(sources.values()):
        raise fail(f"source must say where {', '.join(_SOURCES)} come from, each in words or as an address")
    return Device(
        name=entry["name"],
        title=entry["title"],
        kind=entry["class"],
        memory_bytes=memory,
        usable=Fraction(str(usable)),
        runtimes=dict(runtimes),
        types=_types(entry.get("types", {}), runtimes, fail),
        context=context,
        sources={name: str(sources[name]) for name in _SOURCES},
        largest_file=largest_file,
        whole_prompts=tuple(whole),
        defined_in=where,
    )


def _types(types: Any, runtimes: dict[str, str], fail: Callable[[str], DeviceFileError]) -> dict[str, tuple[str, ...]]:
    if not isinstance(types, dict) or not set(types) <= set(runtimes):
        raise fail(f"types must be lists by format, for formats of runtimes ({', '.join(runtimes)})")
    for target, names in types.items():
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise fail(f"types.{target} must be a list of type names")
        try:
            export_format(target).choose_types(tuple(names))
        except AcipError as reason:
            raise fail(f"types.{target}: {reason}") from reason
    return {target: tuple(names) for target, names in types.items()}
