"""What a release is made of: the same bytes from two builds, and lists that are those of the tested versions."""

from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.build_release import build
from tools.generate_licences import PAGE, page, pinned


@pytest.mark.slow
def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        first = build(tmp_path / "first")
    finally:
        os.umask(before)
    second = build(tmp_path / "second")
    assert [file.name for file in first] == [file.name for file in second]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    sdist, wheel = first
    with tarfile.open(sdist) as archive, zipfile.ZipFile(wheel) as packed:
        stored = {name.partition("/")[2] for name in archive.getnames()}
        modules = {name for name in packed.namelist() if name.endswith(".py")}
    assert modules and modules <= stored


def test_licences_are_those_of_the_pinned_versions() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert all(f"| {name} | {version} |" in written for name, version in pinned().items())
    assert "| not said |" not in written
    # Other platforms have fewer packages.
    here = [row for row in page().splitlines() if "not installed" not in row]
    assert set(here) <= set(written.splitlines()), "make licences"
