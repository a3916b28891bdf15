"""Find a device by its name: in the package's table, and in the files of users."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from fractions import Fraction
from importlib.resources import files
from pathlib import Path

from acip_export.artifacts.speeds import RuntimeSpeed, load_speeds
from acip_export.choices import nearest
from acip_export.devices.device import BUILT_IN, Device
from acip_export.devices.files import Known, parse_devices
from acip_export.errors import DeviceFileError, SpeedsVersionError, UsageError
from acip_export.formats.registry import export_format, format_names
from acip_export.io.inputs import read_input
from acip_export.machine import memory_bytes

logger = logging.getLogger(__name__)

DEVICES_VARIABLE = "ACIP_EXPORT_DEVICES"
# The machine that the command runs on, whatever it is.
THIS_MACHINE = "this"
_USABLE_HERE = Fraction(1, 2)


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
    """Return how fast runtimes are on a device; ``None``: on this machine. Empty: nobody has measured or reported it.

    What another version of this tool measured on this machine is left out, with a warning, unless it is ``needed``:
    nobody named that file.

    Raises:
        DeviceFileError: the file that has it is missing or malformed.
    """
    if device is not None and device.name != THIS_MACHINE:
        return device.reported_speeds() if device.speeds is None else load_speeds(device.speeds).runtimes
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
    known = parse_devices(files(__package__).joinpath("devices.toml").read_bytes(), BUILT_IN, Known())
    named = os.environ.get(DEVICES_VARIABLE)
    found = [user_file()] if user_file().is_file() else []
    for file in (*found, *([Path(named)] if named else []), *([extra] if extra else [])):
        known = parse_devices(read_input(file, DeviceFileError), str(file), known)
    return dict(known.devices)


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
