"""A converted export is never thrown away, a good one is never harmed, and what takes too much is planned again."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acip_export.artifacts.names import MARK_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.artifacts.report import load_report
from acip_export.errors import RuntimeCrashError
from acip_export.io.outputs import sizes_below
from acip_export.verification import export as verification
from converters.gguf import memory
from tests.api.conftest import SAMPLE
from tests.support import Run, make_model, make_scores

# q8_0 only: nothing is measured before planning.
PLAN = ("--format", "gguf", "--types", "q8_0", "--no-calibrate", "--context", "128", "--accept-loss")


def _names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()} - {"model"}


def _no_temporary_names(text: str) -> None:
    assert not re.search(r"\.[0-9a-f]{8}\.|/tmp/tmp", text), text


def test_a_failed_one_stays_and_verify_lifts_the_mark(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        # Nothing is so close.
        patch.setattr(verification, "_ROUNDED_ACTIVATIONS_KL", -1.0)
        done = run("-m", "model", *PLAN, "--budget", "8MB", "-o", "out")
    assert done.code == 6
    assert _names(here) == {"out"}
    plan = load_plan(here / "out" / "plan.json")
    counts = f"{plan.planned_bytes:,} bytes planned, {plan.planned_bytes:,} written"
    assert "KL from the bundle" in done.err
    assert counts in " ".join(done.err.split())
    command = re.search(r"Verify it with:  acip-export (.*)", done.err)
    assert command is not None
    _no_temporary_names(done.err + done.out)
    mark = (here / "out" / MARK_FILE).read_text()
    assert "not verified" in mark and "KL from the bundle" in mark
    assert not load_report(here / "out" / "report.json").passed
    assert (here / "out" / "report.html").is_file()
    # What is marked needs --force to be replaced, like any other.
    assert run("-m", "model", *PLAN, "--budget", "8MB", "-o", "out").code == 2
    again = run(*command[1].split())
    assert again.code == 0, again.err
    assert not (here / "out" / MARK_FILE).exists()
    assert load_report(here / "out" / "report.json").passed


@pytest.mark.slow
def test_a_good_one_is_never_harmed(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("-m", "model", *PLAN, "--budget", "8MB", "-o", "out")
    assert run(*flags).code == 0
    good = sizes_below(here / "out")
    assert run(*flags).code == 2  # without --force
    with monkeypatch.context() as patch:
        patch.setattr(verification, "_ROUNDED_ACTIVATIONS_KL", -1.0)
        done = run(*flags, "--force")
        assert done.code == 6
        assert sizes_below(here / "out") == good
        assert load_report(here / "out" / "report.json").passed
        assert _names(here) == {"out", "out-unverified"}
        assert "out-unverified" in done.err
        assert run(*flags, "--force").code == 6  # and once more
        assert sizes_below(here / "out") == good
    (here / "out-unverified" / "mine.txt").write_text("mine")
    assert run(*flags, "--force").code == 2  # ours is no more what is there
    (here / "out-unverified" / "mine.txt").unlink()
    done = run(*flags, "--force")
    assert done.code == 0, done.err
    assert _names(here) == {"out"}
    assert not (here / "out" / MARK_FILE).exists()
    assert load_report(here / "out" / "report.json").export == "out"


def test_a_crash_of_the_runtime_keeps_its_exit_code(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_arguments: object, **_settings: object) -> None:
        raise RuntimeCrashError("it died")

    monkeypatch.setattr(verification, "verify_decoder", crash)
    done = run("-m", "model", *PLAN, "--budget", "8MB", "-o", "out")
    assert done.code == 6
    assert "it died\nThe export stays in out, marked as unverified" in done.err
    assert _names(here) == {"out"} and (here / "out" / MARK_FILE).is_file()
    again = run("-m", "model", *PLAN, "--budget", "8MB", "-o", "out")
    assert again.code == 2
    said = " ".join(again.err.split())
    assert "out already exists, and is not verified" in said and "acip-export verify out or add --force" in said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(here: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "acip_export", "-m", "model", *PLAN, "--budget", "8MB", "-o", "out"]
    environment = {**os.environ, "PYTHONPATH": str(SAMPLE.parents[1])}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        patience = time.monotonic() + 240
        while not (here / "out" / MARK_FILE).is_file() and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.02)
        process.send_signal(how)
        _, said = process.communicate(timeout=240)
    plan = load_plan(here / "out" / "plan.json")
    assert {name: (here / "out" / name).stat().st_size for name in plan.files} == dict(plan.files)
    assert "acip-export verify out --model" in (here / "out" / MARK_FILE).read_text()
    if how is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 130
    assert _names(here) == {"out"}
    assert "The export stays in out, marked as unverified" in said
    _no_temporary_names(said)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_too_much_memory_is_planned_again(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A prediction that forgets a part of llama.cpp's own: its process takes more than the budget."""
    # 14 million weights, 6.5 MB from q8_0 to q4_0: two processes with the same export differ by a megabyte.
    make_scores(make_model(tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=4))
    monkeypatch.chdir(tmp_path)
    name = next(iter(memory.RUNTIMES))
    base = memory.RUNTIMES[name]
    flags = ("-m", "model", "--format", "gguf", "--types", "q8_0,q4_0", "--no-calibrate", "--accept-loss")
    # Prompts of a batch are no shorter: plans differ in their types alone.
    flags = (*flags, "--context", "32", "--budget-scope", "process")
    # What the process takes differs by megabytes between machines.
    assert run(*flags, "--budget", "60MB", "-o", "large").code == 0
    (runtime,) = load_report(tmp_path / "large" / "report.json").runtimes
    assert runtime.memory is not None
    taken, predicted = runtime.memory.peak_bytes, runtime.memory.predicted_bytes
    forgotten = predicted - taken + 2_800_000
    monkeypatch.setitem(memory.RUNTIMES, name, dataclasses.replace(base, library=base.library - forgotten))
    budget = taken - 2_500_000
    done = run(*flags, "--budget", f"{budget}B", "-o", "out")
    assert done.code == 0, done.err
    assert caplog.text.count("planned again") in (1, 2)
    plan, report = load_plan(tmp_path / "out" / "plan.json"), load_report(tmp_path / "out" / "report.json")
    assert plan.budget_bytes == budget
    assert any(note.startswith("planned for") for note in plan.notes)
    (runtime,) = report.runtimes
    assert runtime.memory is not None and runtime.memory.within_budget
    assert runtime.memory.peak_bytes <= budget
    assert _names(tmp_path) == {"large", "out"} and not (tmp_path / "out" / MARK_FILE).exists()
    # Where nothing smaller is left, that is said, and what was written stays.
    monkeypatch.setitem(memory.RUNTIMES, name, dataclasses.replace(base, library=base.library - 12_000_000))
    budget = predicted - 12_000_000 - 5_000_000
    done = run(*flags, "--budget", f"{budget}B", "-o", "small")
    assert done.code == 6
    said = " ".join(done.err.split())
    assert f"more than the budget of {budget:,}, and no plan takes so much less" in said
    assert "The export stays in small, marked as unverified" in done.err
    assert re.search(r"Give it  --budget \d+MB", done.err)
    assert (tmp_path / "small" / MARK_FILE).is_file()
