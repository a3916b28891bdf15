"""The environment of processes that run modules of ours."""

from __future__ import annotations

import os
from pathlib import Path

from acip_export import version


def module_environment() -> dict[str, str]:
    """Return the environment of a process that runs one of our modules, with ``-P``.

    Modules come from where this package is, never from the working directory: that may be a downloaded model's.
    """
    package = str(Path(version.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without it ggml starts a debugger when it aborts, whose output buries the reason.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}
