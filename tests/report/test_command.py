from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from acip_export.artifacts.names import CARD_FILE, PAGE_FILE
from acip_export.report.page import embedded
from tests.report.conftest import TYPES, Exports
from tests.support import Run, make_model


@pytest.fixture
def export(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the smaller export, in a working directory that is no model."""
    shutil.copytree(exports.directories[0], tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "export"


def _points(export: Path) -> int:
    data = embedded((export / PAGE_FILE).read_text(encoding="utf-8"))
    assert data is not None
    return len(data.points)


@pytest.mark.slow
def test_rebuilt_from_the_score_file(exports: Exports, export: Path, run: Run) -> None:
    (export / PAGE_FILE).unlink()
    (export / CARD_FILE).unlink()
    asked = ("--model", exports.checkpoint.path, "--types", ",".join(TYPES), "--sizes", 4, "--json")
    done = run("report", "export", exports.directories[1], *asked)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "written": [str(Path("export", PAGE_FILE)), str(Path("export", CARD_FILE))],
        "planned_sizes": 4,
    }
    assert _points(export) >= 5
    assert (export / CARD_FILE).is_file()
    # From the report.json, and with what the page has: the sizes stay.
    before = (export / PAGE_FILE).read_bytes()
    again = run("report", "export/report.json")
    assert again.code == 0, again.err
    assert "no model with a score file here" in again.err
    assert (export / PAGE_FILE).read_bytes() == before


def test_bad_input(exports: Exports, export: Path, run: Run, tmp_path: Path) -> None:
    before = (export / PAGE_FILE).read_bytes()
    other = make_model(tmp_path / "other", num_hidden_layers=1)
    for arguments, code, says in (
        (("nowhere",), 3, "nowhere is no export: it does not exist"),
        (("export", "--sizes", "1"), 2, "--sizes"),
        (("export", "--model", other), 3, "is not the model of this export"),
        (
            ("export", "--model", other, "--scores", next(exports.checkpoint.path.glob("*.acip"))),
            3,
            "is not the model of this export",
        ),
        (("export", "--scores", "nowhere.acip"), 3, "config.json"),
    ):
        done = run("report", *arguments)
        assert (done.code, done.out) == (code, ""), done.err
        assert says in done.err
    assert (export / PAGE_FILE).read_bytes() == before


def test_verify_writes_them_too(exports: Exports, export: Path, run: Run) -> None:
    (export / PAGE_FILE).unlink()
    done = run("verify", "export", "--model", exports.checkpoint.path)
    assert done.code == 0, done.err
    assert _points(export) == 1
