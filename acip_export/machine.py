"""Say what this machine has."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Where Linux says what a container may take, in its second and first version of control groups.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes(limits: tuple[str, ...] = _CONTAINER_LIMITS) -> int:
    """Return the memory of this machine, or of the container that this process is in, if that is less."""
    installed = (
        _windows_memory() if sys.platform == "win32" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return min([installed, *filter(None, map(_limit, limits))])


def processors() -> int:
    """Processors that this process may use; ``OMP_NUM_THREADS`` limits them, as it does elsewhere."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdecimal() and int(limit):
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _limit(file: str) -> int | None:
    try:
        text = Path(file).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max"


def _windows_memory() -> int:
    kilobytes = ctypes.c_ulonglong()
    ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))  # type: ignore[attr-defined]
    return kilobytes.value * 1024
