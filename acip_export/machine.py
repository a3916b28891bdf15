"""Say what this machine has, and what it does in a second."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Where Linux says what a container may take, in its second and first version of control groups.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """Hold what a machine does in a second.

    Attributes:
        float32, float64: operations of products, with all threads.
        calls: of numpy on short arrays, in one thread: what loops of Python around them are counted in.
        threads: that compute.
        bfloat16: whether it multiplies bfloat16 matrices faster than float32 ones; others emulate it, far slower.
    """

    float32: float
    float64: float
    calls: float
    threads: int
    bfloat16: bool = False

    @classmethod
    def measured(cls, width: int, clock: Callable[[], float] = time.perf_counter) -> Machine:
        """Measure this one, for half a second, on products of matrices about as wide as a model's.

        Args:
            clock: seconds; those of one process leave the others out, as long as it computes in one thread.
        """
        import numpy as np
        import torch

        width = max(256, min(width, 2048))

        def spent(work: Callable[[], object], seconds: float) -> Iterator[float]:
            until = time.perf_counter() + seconds
            while True:
                begin = clock()
                work()
                yield max(clock() - begin, 1e-9)
                if time.perf_counter() >= until:
                    return

        def products(dtype: torch.dtype) -> float:
            left, right = torch.ones(1024, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
            return 2 * left.numel() * width / min(spent(lambda: left @ right, 0.25))

        short = np.ones(64, np.float32)

        def calls() -> None:
            for _ in range(1000):
                np.multiply(short, short, out=short)

        # Too short to be interrupted, so that the best of them would say nothing about the load.
        taken = list(spent(calls, 0.1))
        speeds = products(torch.float32), products(torch.float64), 1000 * len(taken) / sum(taken)
        return cls(*speeds, torch.get_num_threads(), fast_bfloat16())


def use_threads(count: int) -> None:
    """Let torch use so many threads in the thread that calls this.

    The first call of torch in a thread takes over what another one has set last, whatever was set here before.
    """
    import torch

    torch.get_num_threads()
    torch.set_num_threads(count)


def fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices faster than float32 ones: others emulate it, far slower."""
    import torch

    able = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # older versions of torch cannot tell
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "arm_bf16"))


def memory_bytes(limits: tuple[str, ...] = _CONTAINER_LIMITS) -> int:
    """Return the memory of this machine, or of the container that this process is in, if that is less."""
    installed = (
        _windows_memory() if sys.platform == "win32" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    return min([installed, *filter(None, map(_limit, limits))])


def processors(limited: bool = True) -> int:
    """Processors that this process may use; ``OMP_NUM_THREADS`` limits them, as it does elsewhere, if ``limited``."""
    limit = os.environ.get("OMP_NUM_THREADS", "") if limited else ""
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
