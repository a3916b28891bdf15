"""``acip-export devices``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.cli import output as console
from acip_export.cli.options import Debug, DeviceFile, Json, Quiet
from acip_export.cli.tables.devices import show_device, show_devices, show_holders
from acip_export.devices import find_device, load_devices
from acip_export.errors import UsageError


def devices(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one with its sources.")] = None,
    fits: Annotated[
        Path | None,
        typer.Option("--fits", metavar="EXPORT", help="Only those that can run this export, or this plan."),
    ] = None,
    devices_: DeviceFile = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the devices that --device knows, or show one with the source of every figure.

    acip-export devices

    acip-export devices raspberry-pi-5-8gb

    acip-export devices --fits export/gguf-900MB

    Your own: the same form as docs/devices.md describes, in --devices FILE, in the file that ACIP_EXPORT_DEVICES names,
    or in devices.toml in the configuration directory (~/.config/acip-export).
    """
    known = load_devices(devices_)
    if fits is not None:
        if name is not None:
            raise UsageError(f"{name} and --fits: one of them lists devices, the other shows one; leave one out")
        plan = load_plan(fits / PLAN_FILE if fits.is_dir() else fits)
        obstacles = {device.name: device.obstacle(plan) for device in known.values()}
        holding = [device for device in known.values() if obstacles[device.name] is None]
        if json:
            console.print_json(
                {
                    "process_bytes": plan.process_bytes,
                    "devices": [
                        {"name": each.name, "budget_bytes": each.budget_bytes, "slow_types": each.slow_types(plan)}
                        for each in holding
                    ],
                    "others": {name: why for name, why in obstacles.items() if why is not None},
                }
            )
        else:
            show_holders(plan, holding, [why for why in obstacles.values() if why is not None])
        return
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
