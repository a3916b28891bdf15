from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acip_export.check.lock import dumps_lock, load_lock, save_lock
from acip_export.check.quality import Quality, read_quality
from acip_export.check.snapshot import take_snapshot, with_hashes
from acip_export.errors import BaselineError, BaselineVersionError, InputError
from tests.check.models import write_gguf
from tests.reports import RUNTIME, report_document


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    model = write_gguf(tmp_path / "m.gguf")
    snapshot = with_hashes(take_snapshot(model, "m.gguf"), model)
    save_lock({"m": snapshot}, tmp_path / "lock.json")
    return tmp_path / "lock.json"


def test_round_trip_is_exact_and_deterministic(lock: Path) -> None:
    loaded = load_lock(lock)
    assert dumps_lock(loaded) == lock.read_text(encoding="utf-8")
    assert json.loads(lock.read_text(encoding="utf-8"))["entries"]["m"]["total_bytes"] == loaded["m"].total_bytes
    model = lock.parent / "m.gguf"
    assert loaded["m"] == with_hashes(take_snapshot(model, "m.gguf"), model)


def test_one_line_a_tensor(lock: Path) -> None:
    assert '    "blk.0.attn_q.weight": ["q4_k", [4, 256], 576],\n' in lock.read_text(encoding="utf-8")


def test_empty(tmp_path: Path) -> None:
    save_lock({}, tmp_path / "lock.json")
    assert load_lock(tmp_path / "lock.json") == {}


def _set(path: str, value: Any) -> Any:
    def change(data: Any) -> Any:
        *parents, last = path.split("/")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
        return data

    return change


DAMAGED = {
    "a list": lambda _: [1],
    "another format": _set("artifact", "acip-plan"),
    "no entries": lambda data: {k: v for k, v in data.items() if k != "entries"},
    "entries is a list": _set("entries", []),
    "wrong total": _set("entries/m/total_bytes", 7),
    "negative bytes": _set("entries/m/files/m.gguf/bytes", -1),
    "bytes as text": _set("entries/m/files/m.gguf/bytes", "12"),
    "bytes as truth": _set("entries/m/files/m.gguf/bytes", True),
    "tensor of two fields": _set("entries/m/tensors/output.weight", ["q4_k", [4]]),
    "tensor is null": _set("entries/m/tensors/output.weight", None),
    "control characters": _set("entries/m/tensors", {"\x1b[2J": ["q4_k", [1], 1]}),
    "unknown quality": _set("entries/m/quality", {"x": 1}),
    "no architecture": _set("entries/m/architecture", None),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case: str, lock: Path) -> None:
    lock.write_text(json.dumps(DAMAGED[case](json.loads(lock.read_text(encoding="utf-8")))))
    with pytest.raises(BaselineError, match=r"edited by hand"):
        load_lock(lock)


@pytest.mark.parametrize("version", [1, 0, "1", None])
def test_unknown_versions_are_refused(version: object, lock: Path) -> None:
    lock.write_text(json.dumps({**json.loads(lock.read_text(encoding="utf-8")), "version": version}))
    with pytest.raises(BaselineVersionError, match="this tool reads 2"):
        load_lock(lock)


@pytest.mark.parametrize("text", ["", "{", "<<<<<<< HEAD\n{}", "[" * 100_000])
def test_unreadable(text: str, lock: Path) -> None:
    lock.write_text(text)
    with pytest.raises(BaselineError, match="check --update"):
        load_lock(lock)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Quality(0.8, "perplexity", 0.5, 1000)),
        ({"similarity": 0.97}, Quality(0.97, "similarity", 0.5, 1000)),
        ({"dense_perplexity": None}, Quality(None, "", 0.5, 1000)),
        ({"runtimes": ()}, Quality(None, "", None, 1000)),
        ({"runtimes": (replace(RUNTIME, perplexity=None, load_seconds=None),)}, Quality(None, "", None, 1000)),
    ],
)
def test_quality(changes: dict[str, Any], expected: Quality, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report_document(**changes)))
    assert read_quality(file) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"passed": False}, "failed its verification"),
        ({"version": 3}, "version 3"),
        ({"artifact": "x"}, "acip-report"),
        ({"runtimes": None}, r"\$.runtimes: expected array, got null"),
        ({"runtimes": [3]}, r"\$.runtimes\[0\]: expected object, got int"),
        ({"dense_perplexity": 3}, r"\$.dense_perplexity: expected object"),
        ({"written_bytes": None}, r"\$.written_bytes: expected int, got null"),
    ],
)
def test_bad_reports(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**report_document(), **changes}))
    with pytest.raises(InputError, match=says):
        read_quality(file)
