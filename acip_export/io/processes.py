"""The environment of processes that run modules of ours."""

from __future__ import annotations

import os
from pathlib import Path

from acip_export import version

# How threads of PyTorch wait for each other: asleep, after microseconds (the second is GNU's own). Those of numpy's
# products spin, and our products in numpy are too small for them.
_SETTINGS = ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}, {"OPENBLAS_NUM_THREADS": "1"})
_ours: set[str] = set()


def let_threads_sleep() -> None:
    """Have threads that wait for each other sleep instead of spinning; PyTorch and numpy must not be loaded yet.

    Beside a second busy process, or threads of our own, spinning threads take the others' turns: a ranking took four
    times its share. Nothing changes where the user has said how they wait.
    """
    for settings in _SETTINGS:
        if settings.keys().isdisjoint(os.environ):
            os.environ.update(settings)
            _ours.update(settings)


def let_threads_spin() -> None:
    """Take that back, for a command that times runtimes in this process."""
    for name in _ours:
        os.environ.pop(name, None)
    _ours.clear()


def module_environment() -> dict[str, str]:
    """Return the environment of a process that runs one of our modules, with ``-P``.

    Modules come from where this package is, never from the working directory: that may be a downloaded model's.
    """
    package = str(Path(version.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Runtimes run as they do elsewhere: llama.cpp answers a tenth slower when its threads sleep.
    inherited = {name: value for name, value in os.environ.items() if name not in _ours}
    # Without it ggml starts a debugger when it aborts, whose output buries the reason.
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}
