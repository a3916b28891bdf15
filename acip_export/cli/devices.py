"""``acip-export devices``."""

from __future__ import annotations

from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Debug, DeviceFile, Json, Quiet
from acip_export.cli.tables.devices import show_device, show_devices
from acip_export.devices import find_device, load_devices


def devices(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one with its sources.")] = None,
    devices_: DeviceFile = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the devices that --device knows, or show one with the source of every figure.

    acip-export devices

    acip-export devices raspberry-pi-5-8gb

    Your own: the same form as docs/devices.md describes, in --devices FILE, in the file that ACIP_EXPORT_DEVICES names,
    or in devices.toml in the configuration directory (~/.config/acip-export).
    """
    known = load_devices(devices_)
    if name is not None:
        device = find_device(name, known)
        if json:
            console.print_json(device.to_json())
        else:
            show_device(device)
    elif json:
        console.print_json([device.to_json() for device in known.values()])
    else:
        show_devices(list(known.values()))
