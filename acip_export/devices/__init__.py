"""Devices by name: how much memory a model may take there, and how fast what runs it is. See docs/devices.md.

The table of the package is ``devices.toml``. Users add their own, in the same form: in the configuration directory, in
the file that the environment variable ``ACIP_EXPORT_DEVICES`` names, or with ``--devices FILE``.
"""

from acip_export.devices.device import BUILT_IN, Device
from acip_export.devices.files import ChipTable, DeviceTable, ModelTable, ReportTable, Sources
from acip_export.devices.known import (
    DEVICES_VARIABLE,
    THIS_MACHINE,
    find_device,
    load_devices,
    speeds_file,
    speeds_of,
    user_file,
)
from acip_export.devices.reports import Chip

__all__ = [
    "BUILT_IN",
    "DEVICES_VARIABLE",
    "THIS_MACHINE",
    "Chip",
    "ChipTable",
    "Device",
    "DeviceTable",
    "ModelTable",
    "ReportTable",
    "Sources",
    "find_device",
    "load_devices",
    "speeds_file",
    "speeds_of",
    "user_file",
]
