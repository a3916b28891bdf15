"""Run an export in a process of its own: memory and time are measured there, and a crash or a hang ends only it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec
import numpy as np
import numpy.typing as npt

from acip_export.artifacts.report import Memory, Speed
from acip_export.errors import MissingExtraError, RuntimeCrashError, RuntimeHangError, VerificationError
from acip_export.formats.session import Logits, Windows
from acip_export.io.inputs import Count, NotNegative, read_json
from acip_export.io.processes import module_environment

DEFAULT_TIMEOUT_SECONDS = 900.0
_PROBE = "acip_export.verification.probe"
_TAIL_BYTES, _TAIL_LINES = 8192, 40


@dataclass(frozen=True)
class ProcessFigures:
    """What one fresh process said.

    Attributes:
        memory: ``None`` where the system does not tell (``/proc`` is Linux's).
        greedy: the most likely tokens after the prompt that was given.
        tokens: of the texts that were given; ``None``: the runtime has no tokenizer.
    """

    runtime: str
    load_seconds: NotNegative
    memory: Memory | None
    speed: Speed
    greedy: tuple[Count, ...] = ()
    tokens: tuple[tuple[Count, ...], ...] | None = None


class Answer(msgspec.Struct, frozen=True):
    """What the process writes: its figures or its runtime's name, a MissingExtraError's fields, or what is wrong."""

    figures: ProcessFigures | None = None
    runtime: str = ""
    missing: tuple[str, str, str, str | None] | None = None
    error: str = ""


def measure_process(
    module: str,
    class_name: str,
    export: Path,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    prompt: Sequence[int] = (),
    count: int = 0,
    texts: Sequence[str] = (),
) -> ProcessFigures:
    """Open ``export`` with a session class in a fresh process, fill its plan's context and generate.

    Args:
        prompt, count: of language models: the ``count`` most likely tokens after ``prompt`` are wanted too.
        texts: and the runtime's tokens of these.

    Raises:
        RuntimeCrashError: the process died; the message has the signal and the end of its output.
        RuntimeHangError: it was not done after ``timeout`` seconds, and was killed.
        VerificationError: the runtime refuses the export. MissingExtraError: it is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "asked.json"
        given.write_text(json.dumps({"prompt": list(prompt), "count": count, "texts": list(texts)}))
        with _Probe(module, class_name, export, Path(scratch), timeout, ["measure", str(given)]) as probe:
            figures = probe.answer().figures
    assert figures is not None
    return figures


@contextmanager
def logits_of_process(
    module: str, class_name: str, export: Path, windows: Windows, timeout: float = DEFAULT_TIMEOUT_SECONDS
) -> Iterator[Iterator[Logits]]:
    """Open ``export`` in a fresh process, and get the logits of ``windows`` from it, one window at a time.

    Args:
        timeout: seconds for a window.

    Raises:
        As :func:`measure_process`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "windows.npy"
        np.save(given, windows)
        with _Probe(module, class_name, export, Path(scratch), timeout, ["logits", str(given)]) as probe:
            yield (probe.array() for _ in windows)


class _Probe:
    """The process: stopped, with everything that it started, whatever happens."""

    def __init__(
        self, module: str, class_name: str, export: Path, scratch: Path, timeout: float, task: Sequence[str]
    ) -> None:
        self._class_name, self._export, self._timeout = class_name, export, timeout
        self._result = scratch / "result.json"
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", _PROBE]
        self._command = [*command, module, class_name, str(export), str(self._result), *task]
        self._output: BinaryIO = (scratch / "output").open("w+b")

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=module_environment(),
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        kill(self._process)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._output.close()

    def array(self) -> Logits:
        """The next array that it writes."""
        shape = np.empty(2, np.int64)
        with self._in_time():
            if self._fill(shape):
                found = np.empty(tuple(shape), np.float32)
                if self._fill(found):
                    return found
        self.answer()
        raise VerificationError(f"{self._class_name} gave logits of fewer windows than it was asked for")

    def _fill(self, array: npt.NDArray[Any]) -> bool:
        """Read an array; tell whether the process has written all of it."""
        assert self._process.stdout is not None
        rest = memoryview(array.view(np.uint8).reshape(-1).data)
        while rest:
            count = self._process.stdout.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                return False
            rest = rest[count:]
        return True

    def answer(self) -> Answer:
        """Wait until it has ended."""
        with self._in_time():
            status = self._process.wait()
        if status or not self._result.is_file():
            raise RuntimeCrashError(
                f"the process that ran {self._export} in {self._class_name} {ending(status)}; the end of its output:"
                f"\n{tail(self._output)}\nThe export, or the runtime's build for this machine, is broken"
            )
        answer = read_json(self._result, Answer, RuntimeCrashError)
        if answer.missing is not None:
            raise MissingExtraError(*answer.missing)
        if answer.error:
            raise VerificationError(answer.error)
        return answer

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Kill the process when it takes longer than it may; reading from it then ends."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            kill(self._process)

        timer = threading.Timer(self._timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if late.is_set():
                raise RuntimeHangError(
                    f"the process that ran the export in {self._class_name} gave no result in {self._timeout:g} s and "
                    f"was killed; the end of its output:\n{tail(self._output)}\nAllow it more with  --timeout SECONDS"
                )


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
