"""A verification that was killed or interrupted goes on to the same figures, and computes only what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from acip_export import api as pipeline
from acip_export.artifacts.report import Report
from acip_export.model import block_model
from acip_export.model.block_model import BlockModel
from acip_export.progress import Progress
from acip_export.verification import decoders, process
from acip_export.verification import unfinished as keeping
from acip_export.verification.reference import StoredReference
from tests.verification.conftest import Made, MakeExport

pytestmark = pytest.mark.usefixtures("kept_at_once")

LAYERS = 2


@pytest.fixture(params=["gguf", "onnx"])
def made(request: pytest.FixtureRequest, exported: MakeExport, tmp_path: Path) -> Made:
    """A copy, beside which nothing lies."""
    made: Made = exported(request.param)
    return replace(made, export=Path(shutil.copytree(made.export, tmp_path / "place" / "export")))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All is kept at once; what takes long is noted."""
    monkeypatch.setattr(keeping, "_WORTH_KEEPING", 0.0)
    seen: list[str] = []
    read, measure, logits = BlockModel.read_block, process.measure_process, process.logits_of_process

    def read_block(model: BlockModel, block: str) -> object:
        seen.append("block")
        return read(model, block)

    def measure_process(*arguments: object) -> object:
        seen.append("process")
        return measure(*arguments)  # type: ignore[arg-type]

    def logits_of(module: str, name: str, export: Path, windows: NDArray[np.int64], timeout: float) -> object:
        seen.extend(["window"] * len(windows))
        return logits(module, name, export, windows, timeout)

    monkeypatch.setattr(BlockModel, "read_block", read_block)
    monkeypatch.setattr(decoders, "measure_process", measure_process)
    monkeypatch.setattr(decoders, "logits_of_process", logits_of)
    return seen


def stop_at(wanted: str, after: int) -> Callable[[Progress], None]:
    """Interrupt so many reports behind the first that has ``wanted`` in its item."""
    left = after

    def callback(progress: Progress) -> None:
        nonlocal left
        if wanted in progress.item:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

    return callback


def measured(report: Report) -> Report:
    """What does not depend on the machine's mood."""
    return replace(
        report, runtimes=tuple(replace(each, load_seconds=0.0, memory=None, speed=None) for each in report.runtimes)
    )


def verification_of(made: Made, text: Path, counted: list[str]) -> Callable[..., Report]:
    """Verify the export, counted from the beginning."""

    def verify(progress: Callable[[Progress], None] = lambda _: None, text: Path = text) -> Report:
        counted.clear()
        return pipeline.verify_directory(made.export, str(made.model), None, made.bundle, text, progress=progress)

    return verify


def test_it_goes_on_where_it_was(made: Made, text: Path, counted: list[str], caplog: pytest.LogCaptureFixture) -> None:
    verify = verification_of(made, text, counted)

    def stopped(wanted: str, after: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            verify(stop_at(wanted, after))
        assert [file.name for file in directory.parent.iterdir() if file != made.export] == [directory.name]

    directory = made.export.parent / ".export.verification"
    whole = verify()
    assert list(directory.parent.iterdir()) == [made.export]
    runtimes, windows = len(whole.runtimes), counted.count("window")
    assert counted.count("process") == runtimes
    # Behind the bundle's first block, in the dense model's, in the middle of the windows.
    stopped("bundle", 1)
    assert "stays in" in caplog.text
    stopped("dense model", 1)
    assert "bundle: going on behind block 1" in caplog.text and counted.count("process") == 0
    stopped("logits", 4)
    assert "dense model: going on behind block 1" in caplog.text
    seen: list[Progress] = []
    report = verify(seen.append)
    assert measured(report) == measured(whole)
    assert counted.count("process") == 0
    # Blocks that tell how blocks return their states are read in any case.
    assert counted.count("window") == windows - 3
    assert "going on behind window 3" in caplog.text
    done = [each.done for each in seen if each.stage == "verify"]
    assert done == sorted(done) and done[-1] == seen[-1].total
    assert list(directory.parent.iterdir()) == [made.export]


def test_a_head_is_rounded_on(
    made: Made, text: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    verify = verification_of(made, text, counted)
    read, pieces, stop = StoredReference.read, list[int](), 8
    monkeypatch.setattr(block_model, "_SLICE", 1)
    monkeypatch.setattr(block_model, "ROWS_AT_ONCE", 64)

    def watched(self: StoredReference, name: str, rows: object = None) -> object:
        if isinstance(rows, slice):
            if len(pieces) == stop:
                raise KeyboardInterrupt
            pieces.append(rows.start)
        return read(self, name, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(StoredReference, "read", watched)
    whole = verify()
    assert pieces == list(range(0, 512, 64))
    stop = 3
    pieces.clear()
    with pytest.raises(KeyboardInterrupt):
        verify()
    stop = 8
    pieces.clear()
    assert measured(verify()) == measured(whole)
    assert pieces == list(range(3 * 64, 512, 64))
    assert "rounded head: going on behind step 3" in caplog.text
    # Where there is no place for it, it is rounded as before.
    directory = made.export.parent / ".export.verification"
    directory.mkdir()
    (directory / "rounded head").write_text("")
    pieces.clear()
    assert measured(verify()) == measured(whole)
    assert pieces == list(range(0, 512, 64))
    assert list(directory.parent.iterdir()) == [made.export]


def test_what_is_damaged_or_of_another_export_is_not_used(made: Made, text: Path, counted: list[str]) -> None:
    verify = verification_of(made, text, counted)
    whole = verify()
    all_of_it = sorted(counted)
    with pytest.raises(KeyboardInterrupt):
        verify(stop_at("logits", 3))
    directory = made.export.parent / ".export.verification"
    left = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    assert len(left) == 3 + len(whole.runtimes) + len(["origin", "journal", "rows"])

    def put_back(damage: Callable[[bytes], bytes] = lambda data: data) -> None:
        for file, content in left.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(damage(content))

    for damage in (lambda data: data[:-7], lambda _: b"", lambda data: data[:-3] + b"\0" + data[-2:]):
        put_back(damage)
        assert measured(verify()) == measured(whole)
        assert sorted(counted) == all_of_it
    # Another text: of the processes alone the same is to be measured, from the same prompt.
    put_back()
    other = text.with_name("other.txt")
    other.write_text(text.read_text(encoding="utf-8") + "And more of it. " * 40, encoding="utf-8")
    found = verify(text=other)
    again = sorted(counted)
    assert again.count("window") == all_of_it.count("window") + found.text.windows - whole.text.windows  # type: ignore[union-attr]
    assert not directory.exists()
    # An error is no interruption.
    put_back()
    with pytest.raises(ZeroDivisionError):
        verify(lambda progress: 1 // 0 if "dense" in progress.item else None)  # type: ignore[arg-type,return-value]
    assert not directory.exists()
