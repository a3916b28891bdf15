"""A directory of exports side by side: ``inspect`` lists them, and never adds them up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from acip_export.artifacts.export_directory import settle_mark
from acip_export.artifacts.names import CARD_FILE, MANIFEST_FILE, PLAN_FILE, REPORT_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.units import format_nats
from tests.report.conftest import Exports
from tests.support import Run, unspaced


@pytest.fixture
def sizes(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the smaller export, one for each thing that can become of it, beside what is none."""
    sizes = tmp_path / "sizes"
    for name in ("a-verified", "b-unverified", "c-stopped", "d-failed", "e-cut", ".hidden", "bundle", "plan-alone"):
        shutil.copytree(exports.directories[0], sizes / name)
    (sizes / "b-unverified" / REPORT_FILE).unlink()
    settle_mark(sizes / "c-stopped", ["stopped"])
    failed = json.loads((sizes / "d-failed" / REPORT_FILE).read_text())
    failed["failures"], failed["passed"] = ["off"], False
    (sizes / "d-failed" / REPORT_FILE).write_text(json.dumps(failed))
    plan = load_plan(sizes / "e-cut" / PLAN_FILE)
    smallest = min(plan.files, key=lambda name: plan.files[name])
    (sizes / "e-cut" / smallest).unlink()
    (sizes / "bundle" / MANIFEST_FILE).write_text("{}")
    largest = max(plan.files, key=lambda name: plan.files[name])
    (sizes / "plan-alone" / largest).unlink()
    (sizes / "comparison.html").write_text("<!doctype html>")
    monkeypatch.chdir(tmp_path)
    return sizes


def test_one_row_each(sizes: Path, run: Run) -> None:
    listed = json.loads(run("inspect", "sizes", "--json").out)
    assert (listed["artifact"], listed["version"]) == ("acip-exports", 1)
    found = {Path(each["path"]).name: each for each in listed["exports"]}
    states = {name: each["state"] for name, each in found.items()}
    assert states == {
        "a-verified": "verified",
        "b-unverified": "not verified",
        "c-stopped": "not verified",
        "d-failed": "failed",
        "e-cut": "verified",
    }
    plan = load_plan(sizes / "a-verified" / PLAN_FILE)
    verified = found["a-verified"]
    assert (verified["format"], verified["layout"], verified["mean_kl"] > 0) == ("onnx", plan.layout, True)
    assert verified["written_bytes"] == verified["planned_bytes"] == plan.planned_bytes
    assert found["e-cut"]["written_bytes"] == plan.planned_bytes - min(plan.files.values())
    assert found["b-unverified"]["mean_kl"] is None

    done = run("inspect", "sizes")
    assert done.code == 0, done.err
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert f"{plan.planned_bytes:,}" in rows["a-verified"] and format_nats(verified["mean_kl"]) in rows["a-verified"]
    assert "not verified" in rows["b-unverified"] and "failed" in rows["d-failed"]
    assert "not as planned" in rows["e-cut"] and "not as planned" not in rows["a-verified"]
    command = done.out.splitlines()[-1].split()
    assert command == ["acip-export", "inspect", str(Path("sizes/a-verified"))]
    assert json.loads(run(*command[1:], "--json").out)["total_bytes"] == plan.planned_bytes


def test_one_that_cannot_be_read_hides_no_other(sizes: Path, run: Run) -> None:
    plan, report = sizes / "a-verified" / PLAN_FILE, sizes / "d-failed" / REPORT_FILE
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"version": 99}))
    report.write_text("{}")
    found = {Path(each["path"]).name: each for each in json.loads(run("inspect", "sizes", "--json").out)["exports"]}
    assert [name for name in found if found[name]["state"] == "unreadable"] == ["a-verified", "d-failed"]
    assert "version 99" in found["a-verified"]["problem"] and "report.json" in found["d-failed"]["problem"]
    assert (found["a-verified"]["written_bytes"], found["b-unverified"]["problem"]) == (None, None)
    done = run("inspect", "sizes")
    assert done.code == 0, done.err
    assert unspaced("is a plan of version 99") in unspaced(done.out) and "unreadable" in done.out
    assert done.out.splitlines()[-1].endswith("b-unverified")


def test_one_whose_plan_was_cut_off_is_listed_too(sizes: Path, run: Run) -> None:
    plan = sizes / "a-verified" / PLAN_FILE
    plan.write_bytes(plan.read_bytes()[:1000])
    (sizes / "someone-else").mkdir()
    (sizes / "someone-else" / PLAN_FILE).write_text("{")
    found = {Path(each["path"]).name: each for each in json.loads(run("inspect", "sizes", "--json").out)["exports"]}
    assert found["a-verified"]["state"] == "unreadable" and "is no JSON" in found["a-verified"]["problem"]
    assert "someone-else" not in found and "b-unverified" in found


def test_directories_may_be_named_like_models(sizes: Path, run: Run) -> None:
    (sizes / "a-verified").rename(sizes / "small.gguf")
    assert "small.gguf" in [
        Path(each["path"]).name for each in json.loads(run("inspect", "sizes", "--json").out)["exports"]
    ]


@pytest.mark.usefixtures("sizes")
def test_none_of_them_is_compared_as_one(run: Run) -> None:
    for arguments, instead in (
        (("sizes", "sizes/e-cut"), "sizes/a-verified sizes/e-cut"),
        (("sizes/e-cut", "sizes"), "sizes/e-cut sizes/a-verified"),
    ):
        refused = run("inspect", *arguments)
        assert refused.code == 2
        assert f"acip-export inspect {instead}" in " ".join(refused.err.split())
    assert run("inspect", "sizes/a-verified", "sizes/b-unverified").code == 0


def test_a_model_beside_exports_is_a_model(exports: Exports, sizes: Path, run: Run) -> None:
    """Its own bytes are what is asked for; an export that holds others below it is one as well."""
    for file in exports.checkpoint.path.iterdir():
        if file.is_file() and file.name != CARD_FILE:
            shutil.copy(file, sizes)
    assert json.loads(run("inspect", "sizes", "--json").out)["kind"] == "model"
    shutil.copytree(sizes / "a-verified", sizes / "b-unverified" / "inner")
    assert json.loads(run("inspect", "sizes/b-unverified", "--json").out)["kind"] == "export"
