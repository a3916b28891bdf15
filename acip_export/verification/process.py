"""An export in a process of its own: what it takes there; and a runtime that crashes or hangs takes nobody along."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from acip_export import version
from acip_export.artifacts.report import Memory, Speed
from acip_export.errors import MissingExtraError, RuntimeCrashError, RuntimeHangError, VerificationError
from acip_export.io.inputs import NotNegative, read_json

DEFAULT_TIMEOUT_SECONDS = 900.0
_PROBE = "acip_export.verification.probe"
_TAIL_BYTES, _TAIL_LINES = 8192, 40


@dataclass(frozen=True)
class ProcessFigures:
    """What one fresh process said. ``memory``: ``None`` where the system does not tell (``/proc`` is Linux's)."""

    runtime: str
    load_seconds: NotNegative
    memory: Memory | None
    speed: Speed


class Answer(msgspec.Struct, frozen=True):
    """What the process writes: its figures, the fields of a MissingExtraError, or why there are none."""

    figures: ProcessFigures | None = None
    missing: tuple[str, str, str, str | None] | None = None
    error: str = ""


def measure_process(
    module: str, class_name: str, export: Path, timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> ProcessFigures:
    """Open ``export`` with a session class in a fresh process, fill its plan's context and generate.

    Raises:
        RuntimeCrashError: the process died; the message has the signal and the end of its output.
        RuntimeHangError: it was not done after ``timeout`` seconds, and was killed.
        VerificationError: the runtime refuses the export. MissingExtraError: it is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "output").open("w+b") as output:
        result = Path(scratch) / "result.json"
        arguments = [module, class_name, str(export), str(result)]
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", _PROBE, *arguments]
        status = _run(command, output, timeout, class_name)
        if status or not result.is_file():
            raise RuntimeCrashError(
                f"the process that ran {export} in {class_name} {ending(status)}; the end of its output:\n"
                f"{tail(output)}\nThe export, or the runtime's build for this machine, is broken"
            )
        return _figures(read_json(result, Answer, RuntimeCrashError))


def _run(command: list[str], output: BinaryIO, timeout: float, what: str) -> int:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=module_environment(),
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise RuntimeHangError(
            f"the process that ran the export in {what} gave no result in {timeout:g} s and was killed; the end of "
            f"its output:\n{tail(output)}\nAllow it more with  --timeout SECONDS"
        ) from None
    finally:
        kill(process)


def module_environment() -> dict[str, str]:
    """Return the environment of a process that runs one of our modules.

    Modules come from where this package is, never from the working directory: that may be a downloaded model's.
    """
    package = str(Path(version.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Without it ggml starts a debugger when it aborts, whose output buries the reason.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GGML_NO_BACKTRACE": "1"}


def kill(process: subprocess.Popen[bytes]) -> None:
    """With everything that it started; SIGKILL reaches stopped processes too."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def ending(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"ended with status {status} and no result"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{reason}"


def tail(output: BinaryIO) -> str:
    """Return the end of what a process printed."""
    end = output.seek(0, os.SEEK_END)
    output.seek(max(0, end - _TAIL_BYTES))
    lines = output.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (none)"


def _figures(answer: Answer) -> ProcessFigures:
    if answer.missing is not None:
        raise MissingExtraError(*answer.missing)
    if answer.figures is None:
        raise VerificationError(answer.error)
    return answer.figures
