from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from acip_export.errors import CheckpointError
from acip_export.io.atomic import (
    SafetensorsWriter,
    new_directory,
    new_file,
    read_safetensors_header,
    remove_leftovers,
    sha256_of,
)


class Exploded(BaseException):
    """As abrupt as Ctrl-C."""


def test_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(Exploded), new_directory(target) as directory:
        (directory / "half").write_text("written")
        raise Exploded
    assert list(tmp_path.iterdir()) == []

    with new_directory(target) as directory:
        (directory / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"


def test_existing_directory_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(Exploded), new_directory(target):
        raise Exploded
    assert (target / "old").read_text() == "kept"
    with new_directory(target) as directory:
        (directory / "new").write_text("1")
    assert [f.name for f in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(Exploded), new_file(target) as temporary:
        assert temporary.suffix == "" and len(temporary.name) < len(target.name), "no file of a kind; a short path"
        temporary.write_text("half")
        raise Exploded
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_librarys_own_temporary_file_is_a_leftover(tmp_path: Path) -> None:
    """Safetensors writes to a file of its own beside the one that it is given, and renames it."""
    target = tmp_path / "file"
    code = """
import os, sys
from pathlib import Path
from acip_export.io.atomic import new_file
with new_file(Path(sys.argv[1])) as temporary:
    temporary.with_name(".tmpAbCdEf").write_text("half")
    os._exit(0 if temporary.with_name(".tmpAbCdEf").exists() else 1)
"""
    subprocess.run([sys.executable, "-c", code, str(target)], check=True)
    assert list(tmp_path.rglob(".tmpAbCdEf"))
    remove_leftovers(target)
    assert list(tmp_path.iterdir()) == []


def test_streamed_safetensors_equals_the_library(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(5, np.float16)}
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, {"b": ("F32", (2, 3)), "a": ("F16", (5,))}, {"k": "v"}) as writer:
        writer.write("b", tensors["b"].tobytes())
        with pytest.raises(ValueError, match="expected a"):
            writer.write("c", b"")
        writer.write("a", tensors["a"].tobytes())
    assert writer.sha256 == sha256_of(file)
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)
    assert read_safetensors_header(file, CheckpointError)[1] == {"k": "v"}


def test_missing_tensors_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not written"), SafetensorsWriter(tmp_path / "x", {"a": ("F32", (1,))}, {}):
        pass


def _header(header: object, data: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


BAD = {
    "empty": (b"", "is empty; download it again"),
    "short": (b"\x01\x02", "truncated"),
    "huge header": ((2**62).to_bytes(8, "little") + b"{}", "truncated"),
    "not json": (len(b"nonsense").to_bytes(8, "little") + b"nonsense", "no JSON"),
    "no object": (_header([1]), "header: \\$: expected object"),
    "truncated data": (_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1234"), "truncated"),
    "padded data": (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"), "padded"),
    "wrong length": (_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"1234"), "does not fill"),
    "negative offset": (_header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}), "expected int >= 0"),
    "negative shape": (
        _header({"a": {"dtype": "U8", "shape": [-4, -1], "data_offsets": [0, 4]}}, b"1234"),
        "expected int >= 0",
    ),
    "unknown dtype": (_header({"a": {"dtype": "F7", "shape": [4], "data_offsets": [0, 4]}}, b"1234"), "unknown dtype"),
    "malformed entry": (_header({"a": {"dtype": "F32"}}), "missing required field"),
    "malformed metadata": (_header({"__metadata__": {"a": 1}}), "metadata: .*expected str"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_safetensors(case: str, tmp_path: Path) -> None:
    data, says = BAD[case]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        read_safetensors_header(file, CheckpointError)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": np.arange(8, dtype=np.float32)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_safetensors_header(file, CheckpointError)
