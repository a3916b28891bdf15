"""Exports in processes of their own: real ones, that are killed, stopped, and given files on which the runtime dies."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from acip_export.errors import AcipError, MissingExtraError, RuntimeCrashError, RuntimeHangError, VerificationError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.memory import uncounted_bytes
from acip_export.verification.process import ProcessFigures, measure_process
from tests.verification.conftest import CONTEXT, Made, MakeExport

LLAMA_CPP = ("converters.gguf.runtimes.llama_cpp", "LlamaCppSession")
SESSIONS = {
    "llama.cpp": ("gguf", *LLAMA_CPP),
    "onnxruntime": ("onnx", "converters.onnx.runtimes.onnxruntime", "OnnxRuntimeSession"),
    "onnxruntime-genai": ("onnx", "converters.onnx.runtimes.genai", "GenaiSession"),
}
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("runtime", SESSIONS)
def test_figures_of_a_process(exported: MakeExport, runtime: str) -> None:
    target, module, class_name = SESSIONS[runtime]
    made = exported(target)
    found = measure_process(module, class_name, made.export)
    assert found.runtime.startswith(runtime)
    assert found.load_seconds > 0
    assert found.speed.prefill > 0
    assert found.speed.decode > 0
    assert found.speed.prompt_tokens + found.speed.new_tokens == CONTEXT  # all of it
    assert found.memory is not None
    # What the plan promises. Of llama.cpp's library some pages stay on the disk: up to a fifth of a tiny export's
    # process. Page caches and allocators move peaks by up to 1 MB from run to run.
    uncounted = uncounted_bytes(export_format(made.plan.format), made.plan, Checkpoint.open(made.model), runtime)
    promised = made.plan.memory_bytes + uncounted
    assert 0.7 * promised < found.memory.peak_bytes <= promised + 1_000_000
    # The peak is not below what was there at the end.
    resident = found.memory.anonymous_bytes + found.memory.file_bytes
    assert found.memory.peak_bytes + found.memory.interpreter_bytes >= resident


@contextmanager
def signalled(signal_: signal.Signals) -> Iterator[None]:
    """Send ``signal_`` to the first child process that appears."""
    done = threading.Event()

    def wait_and_send() -> None:
        while not done.is_set():
            for child in _children():
                os.kill(child, signal_)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=wait_and_send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _children() -> list[int]:
    """Of this process, once they run the probe."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            if b"acip_export.verification.probe" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def run(made: Made, timeout: float = 120) -> ProcessFigures:
    return measure_process(*LLAMA_CPP, made.export, timeout)


@needs_proc
@pytest.mark.parametrize("signal_", [signal.SIGSEGV, signal.SIGKILL])
def test_a_killed_process_is_a_crash(exported: MakeExport, signal_: signal.Signals) -> None:
    made = exported("gguf")
    with signalled(signal_), pytest.raises(RuntimeCrashError, match=f"was ended by {signal_.name}") as caught:
        run(made)
    assert ("memory runs out" in str(caught.value)) == (signal_ is signal.SIGKILL)
    assert caught.value.exit_code == 6


@needs_proc
def test_a_stopped_process_is_a_hang_and_is_gone_afterwards(exported: MakeExport) -> None:
    made = exported("gguf")
    with signalled(signal.SIGSTOP), pytest.raises(RuntimeHangError, match=r"(?s)no result in 3 s.*--timeout") as caught:
        run(made, timeout=3)
    assert caught.value.exit_code == 6
    assert _children() == []


def test_a_file_on_which_the_runtime_aborts(exported: MakeExport, tmp_path: Path) -> None:
    made = exported("gguf")
    shutil.copytree(made.export, tmp_path / "e")
    file = tmp_path / "e" / "model.gguf"
    data = bytearray(file.read_bytes())
    value = data.index(b"attention.layer_norm_rms_epsilon") + len("attention.layer_norm_rms_epsilon") + 4
    data[value : value + 4] = b"\0\0\x80\xbf"  # -1: nothing checks it before the norm asserts
    file.write_bytes(data)
    with pytest.raises(RuntimeCrashError, match="SIGABRT") as caught:
        measure_process(*LLAMA_CPP, tmp_path / "e", 120)
    # Its own words, and where it was.
    assert "GGML_ASSERT" in str(caught.value)
    assert "llama_cpp.py" in str(caught.value)


def test_refusals_come_through(exported: MakeExport, tmp_path: Path) -> None:
    made = exported("gguf")
    (tmp_path / "plan.json").write_bytes((made.export / "plan.json").read_bytes())
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(VerificationError, match="cannot be loaded") as caught:
        measure_process(*LLAMA_CPP, tmp_path, 120)
    assert type(caught.value) is VerificationError


def test_a_missing_package_comes_through(exported: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A package that cannot be imported, found before the real one.
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"acip-export\[onnx\]"):
        measure_process(*SESSIONS["onnxruntime"][1:], exported("onnx").export, 120)


def test_nothing_is_imported_from_the_working_directory(
    exported: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users run in model directories that others made."""
    (tmp_path / "numpy.py").write_text("import os; os._exit(99)\n")
    monkeypatch.chdir(tmp_path)
    try:
        run(exported("gguf"))
    except AcipError as error:
        pytest.fail(str(error))
