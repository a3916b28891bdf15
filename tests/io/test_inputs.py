"""Files that are none, in place of every input: a sentence, without waiting or reading them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import load_plan
from acip_export.artifacts.report import load_report
from acip_export.artifacts.scores import load_scores
from acip_export.check.config import load_config
from acip_export.check.lock import load_lock
from acip_export.devices import load_devices
from acip_export.errors import AcipError, InputError, UsageError
from acip_export.inspection import read_anatomy
from acip_export.io.inputs import LARGEST_DOCUMENT, builtins, read_input

Place = Callable[[Path], Path]


def _missing(file: Path) -> Path:
    return file


def _directory(file: Path) -> Path:
    file.mkdir()
    return file


def _pipe(file: Path) -> Path:
    os.mkfifo(file)
    return file


def _device(file: Path) -> Path:
    file.symlink_to("/dev/zero")
    return file


def _dangling(file: Path) -> Path:
    file.symlink_to("nowhere")
    return file


def _loop(file: Path) -> Path:
    file.symlink_to(file.name)
    return file


def _large(file: Path) -> Path:
    with file.open("wb") as stream:
        stream.truncate(LARGEST_DOCUMENT + 1)
    return file


def _long(file: Path) -> Path:
    return file.with_name("x" * 300 + file.name)


def _nul(file: Path) -> Path:
    return file.with_name(f"a\0{file.name}")


BAD: dict[Place, str] = {
    _missing: "does not exist",
    _directory: "is a directory",
    _pipe: "no regular file",
    _device: "no regular file",
    _dangling: "is a link to nowhere, which does not exist",
    _loop: "cannot be read",
    _large: "expected at most 64,000,000|no JSON",
    _long: "cannot be read: File name too long",
    _nul: "cannot be read|null",
}
LOADERS: dict[str, Callable[[Path], object]] = {
    "plan.json": load_plan,
    "report.json": load_report,
    "lock.json": load_lock,
    "acip-check.toml": load_config,
    "devices.toml": load_devices,
    "m.acip": load_scores,
}


@pytest.mark.skipif(os.name == "nt", reason="pipes and links of POSIX")
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("place", BAD, ids=lambda place: place.__name__)
def test_no_regular_file(name: str, place: Place, tmp_path: Path) -> None:
    file = place(tmp_path / name)
    with pytest.raises(AcipError, match=BAD[place]) as caught:
        LOADERS[name](file)
    assert isinstance(caught.value, InputError | UsageError)


def test_a_bundle_of_pipes(tmp_path: Path) -> None:
    for name in ("bundle.json", "plan.json", "config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        Bundle.open(tmp_path)


def test_inspection_of_what_is_no_file(tmp_path: Path) -> None:
    for place, name in ((_pipe, "a.gguf"), (_device, "b.onnx"), (_pipe, "c.safetensors"), (_device, "d.json")):
        with pytest.raises(InputError, match="regular file"):
            read_anatomy(place(tmp_path / name))


def test_a_file_is_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert read_input(tmp_path / "b", InputError, limit=5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes, expected at most 4"):
        read_input(tmp_path / "a", InputError, limit=4)


def test_values_become_plain_ones() -> None:
    """PyTorch's version and NumPy's numbers are subclasses that JSON's own writer takes."""
    version, number = type("Version", (str,), {})("2.13"), np.float64(0.5)
    found = builtins({"a": MappingProxyType({"b": (version, number)})})
    assert found == {"a": {"b": ("2.13", 0.5)}}
    assert [type(value) for value in found["a"]["b"]] == [str, float]
    with pytest.raises(TypeError, match="no value of JSON"):
        builtins({"a": object()})
