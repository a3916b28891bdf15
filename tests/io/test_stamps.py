"""What tells of a file that it has changed, without reading it."""

from __future__ import annotations

import os
from pathlib import Path

from acip_export.io.caches import Kept, measured_beside
from acip_export.io.stamps import stamp_of


def test_a_file_that_was_written_again_or_replaced(tmp_path: Path) -> None:
    """Another one of its size and time too: a copy that keeps times, renamed to its place."""
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("one")
    before = stamp_of(file)
    assert stamp_of(file) == before
    other.write_text("two")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert stamp_of(file) != before
    file.unlink()
    assert before is not None
    assert stamp_of(file) is None


def test_files_that_go_while_they_are_listed(tmp_path: Path) -> None:
    """As where another process removes what it has measured: here, a link that leads nowhere is listed."""
    stays, gone = (tmp_path / f"m.acip.rounding-{name}.json" for name in ("gguf", "onnx"))
    stays.write_text("{}")
    gone.symlink_to(tmp_path / "nowhere")
    assert measured_beside(tmp_path / "m.acip") == {stays: stamp_of(stays)}
    assert Kept("rounding", "", (stays, gone)).nbytes == 2
