"""``inspect`` and ``check`` as they are typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.check.models import SMALL, write_gguf, write_onnx, write_safetensors
from tests.reports import report_document
from tests.support import Run, run_without_importing

LARGER = {**SMALL, "blk.1.attn_q.weight": (4, 256, "Q8_0")}
SMALLER = {**SMALL, "output.weight": (8, 256, "Q4_0")}
CONFIG = '[[check]]\nname = "phone"\npath = "m.gguf"\nmax_bytes = "1MB"\nmax_growth = "1%"\n'


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """On nobody's runner, and on a wide terminal."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "acip-check.toml").write_text(CONFIG)
    return tmp_path


def test_inspect(place: Path, run: Run) -> None:
    shown = run("inspect", "m.gguf")
    assert shown.code == 0, shown.err
    for part in ("blk.*.attn_q.weight", "q4_k", "token_embd.weight", "general.architecture", f"{SIZE(place):,} bytes"):
        assert part in shown.out
    data = json.loads(run("inspect", "m.gguf", "--json").out)
    assert (data["artifact"], data["total_bytes"]) == ("acip-anatomy", SIZE(place))
    assert data["tensor_bytes"] + data["overhead_bytes"] == data["total_bytes"]
    assert len(data["tensors"]) == len(SMALL)


def SIZE(place: Path) -> int:  # noqa: N802
    return (place / "m.gguf").stat().st_size


def test_inspect_two(place: Path, run: Run) -> None:
    write_gguf(place / "n.gguf", LARGER)
    shown = run("inspect", "m.gguf", "n.gguf")
    assert "q4_k → q8_0" in shown.out
    data = json.loads(run("inspect", "m.gguf", "n.gguf", "--json").out)
    assert [change["name"] for change in data["changes"]] == ["blk.1.attn_q.weight"]
    assert data["delta"] == data["changes"][0]["delta"] == 4 * (8 * 34 - 144)
    assert "all 4 tensors are stored alike" in run("inspect", "m.gguf", "m.gguf").out


@pytest.mark.parametrize("write", [write_onnx, write_safetensors])
def test_inspect_other_formats(write: Callable[[Path], Path], place: Path, run: Run) -> None:
    file = write(place / f"m.{write.__name__.removeprefix('write_')}")
    assert json.loads(run("inspect", file, "--json").out)["total_bytes"] == file.stat().st_size
    assert run("inspect", file).code == 0


def test_markup_in_names_is_printed_as_it_is(place: Path, run: Run) -> None:
    write_gguf(place / "m.gguf", {"[bold red]x[/]": (1, 256, "F32"), "[link=http://e]y": (1, 256, "F32")})
    out = run("inspect", "m.gguf").out
    assert "[bold red]x[/]" in out
    assert "[link=http://e]y" in out


def test_the_life_of_a_baseline(place: Path, run: Run) -> None:
    first = run("check")
    assert first.code == 6
    assert "check --update" in first.out
    updated = run("check", "--update")
    assert updated.code == 0, updated.err
    same = run("check")
    assert (same.code, "identical" in same.out) == (0, True)
    lock = (place / "acip-check.lock.json").read_bytes()

    write_gguf(place / "m.gguf", seed=1)
    assert "identical" not in run("check").out
    write_gguf(place / "m.gguf", LARGER)
    larger = run("check", "--json")
    assert larger.code == 6
    (result,) = json.loads(larger.out)["results"]
    assert [p["rule"] for p in result["problems"]] == ["max_growth"]
    assert result["changes"][0]["name"] == "blk.1.attn_q.weight"
    assert "blk.1.attn_q " in run("check").out
    assert (place / "acip-check.lock.json").read_bytes() == lock

    accepted = run("check", "--update")
    assert "baseline written" in accepted.err
    assert run("check", "--update", "--quiet").err == ""  # a note is no result
    assert (accepted.code, "+" in accepted.out) == (0, True)
    assert run("check").code == 0
    write_gguf(place / "m.gguf", SMALLER)
    smaller = run("check")
    assert smaller.code == 0
    assert "tighten the baseline" in smaller.out


def test_update_accepts_growth_but_not_too_many_bytes(place: Path, run: Run) -> None:
    (place / "acip-check.toml").write_text(CONFIG.replace("1MB", "1kB"))
    assert run("check", "--update").code == 6
    assert (place / "acip-check.lock.json").exists()


def test_update_of_a_missing_model_changes_nothing(place: Path, run: Run) -> None:
    run("check", "--update")
    lock = (place / "acip-check.lock.json").read_bytes()
    (place / "m.gguf").unlink()
    failed = run("check", "--update")
    assert failed.code == 6
    assert "was not written" in failed.err
    (place / "acip-check.toml").write_text(CONFIG + 'missing = "skip"\n')
    skipped = run("check", "--update")
    assert (skipped.code, "skipped" in skipped.out) == (0, True)
    assert (place / "acip-check.lock.json").read_bytes() == lock


def test_glob_notices_what_is_gone(place: Path, run: Run) -> None:
    (place / "acip-check.toml").write_text('[[check]]\nname = "all"\nglob = "models/*.gguf"\nmax_growth = "0%"\n')
    empty = run("check")
    assert (empty.code, "nothing matches models/*.gguf" in empty.out) == (6, True)
    for name in "ab":
        write_gguf(place / "models" / f"{name}.gguf")
    assert run("check", "--update").code == 0
    assert run("check").code == 0
    (place / "models" / "a.gguf").unlink()
    gone = run("check", "--json")
    statuses = {r["name"]: r["status"] for r in json.loads(gone.out)["results"]}
    assert statuses == {"all: models/a.gguf": "failed", "all: models/b.gguf": "ok"}


def test_against_a_lock_a_directory_a_model_and_a_report(place: Path, run: Run) -> None:
    main = place.parent / f"{place.name}-main"
    shutil.copytree(place, main)
    run("check", "--update")
    (place / "acip-check.lock.json").rename(main / "old.json")
    write_gguf(place / "m.gguf", LARGER)
    for baseline in (main, main / "m.gguf", main / "old.json"):
        checked = run("check", "--against", baseline, "--json")
        assert checked.code == 6, baseline
        (result,) = json.loads(checked.out)["results"]
        assert result["delta"] == 512
        assert result["changes"][0]["name"] == "blk.1.attn_q.weight"
    (main / "report.json").write_text(json.dumps(report_document(runtimes=(), written_bytes=SIZE(main))))
    (result,) = json.loads(run("check", "--against", main / "report.json", "--json").out)["results"]
    assert (result["status"], result["delta"], result["changes"]) == ("failed", 512, [])


def test_quality_is_the_reports_of_these_very_files(place: Path, run: Run) -> None:
    (place / "acip-check.toml").write_text('[[check]]\npath = "m.gguf"\nmin_recovery = 0.8\n')
    assert "has no report.json" in run("check").out
    (place / "report.json").write_text(json.dumps(report_document(written_bytes=SIZE(place))))
    kept = run("check")
    assert (kept.code, "80.00%" in kept.out) == (0, True)
    write_gguf(place / "m.gguf", SMALLER)
    stale = run("check")
    assert (stale.code, "there are" in stale.out) == (6, True)
    (place / "report.json").write_text(json.dumps(report_document(written_bytes=SIZE(place), passed=False)))
    assert "failed its verification" in run("check").out


def test_all_outputs_at_once(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("check", "--update")
    write_gguf(place / "m.gguf", LARGER)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done = run("check", "--json", "--markdown", "out/c.md", "--junit", "out/c.xml")
    assert done.code == 6
    assert json.loads(done.out)["passed"] is False
    assert (place / "out" / "c.md").read_text(encoding="utf-8").startswith("<!-- acip-export check -->\n")
    assert (place / "out" / "c.xml").read_text(encoding="utf-8").startswith("<?xml")
    assert done.err.splitlines()[0].startswith("::error file=acip-check.toml,title=phone%3A max_growth::")
    to_stdout = run("check", "--markdown", "-")
    assert to_stdout.out == (place / "out" / "c.md").read_text(encoding="utf-8")


def _nothing(_: Path) -> None:
    pass


def _newer_lock(place: Path) -> None:
    (place / "acip-check.lock.json").write_text('{"artifact": "acip-check-lock", "version": 3, "entries": {}}')


def _conflict(place: Path) -> None:
    (place / "acip-check.lock.json").write_text("<<<<<<< HEAD\n")


def _no_config(place: Path) -> None:
    (place / "acip-check.toml").unlink()


def _two_entries(place: Path) -> None:
    (place / "acip-check.toml").write_text(CONFIG + '[[check]]\npath = "n.gguf"\nmax_bytes = "1MB"\n')


def _other_model(place: Path) -> None:
    write_gguf(place / "old.gguf", architecture="qwen2")


def _truncated(place: Path) -> None:
    (place / "m.gguf").write_bytes((place / "m.gguf").read_bytes()[:300])


BAD: list[tuple[Callable[[Path], None], tuple[str, ...], int, str]] = [
    (_no_config, ("check",), 2, "[[check]]"),
    (_nothing, ("check", "--config", "nowhere.toml"), 2, "does not exist"),
    (_nothing, ("check", "--update", "--against", "."), 2, "--against"),
    (_nothing, ("check", "--json", "--markdown", "-"), 2, "stdout"),
    (_newer_lock, ("check",), 3, "version 3"),
    (_newer_lock, ("check", "--update"), 3, "version 3"),
    (_conflict, ("check",), 3, "merge conflict"),
    (_nothing, ("check", "--against", "nowhere"), 3, "does not exist"),
    (_two_entries, ("check", "--against", "m.gguf"), 3, "cannot stand for"),
    (_other_model, ("check", "--against", "old.gguf"), 6, "another model (architecture qwen2, now llama)"),
    (_truncated, ("check",), 6, "truncated"),
    (_truncated, ("check", "--update"), 6, "was not written"),
    (_truncated, ("inspect", "m.gguf"), 3, "truncated"),
    (_truncated, ("inspect", "acip-check.toml"), 3, "is no GGUF"),
    (_nothing, ("inspect", "nowhere"), 3, "does not exist"),
    (_nothing, ("inspect",), 2, "PATH"),
]


@pytest.mark.parametrize(("harm", "arguments", "code", "says"), BAD)
def test_bad_input(
    harm: Callable[[Path], None], arguments: tuple[str, ...], code: int, says: str, place: Path, run: Run
) -> None:
    harm(place)
    before = {file: file.read_bytes() for file in sorted(place.rglob("*"))}
    outcome = run(*arguments)
    assert outcome.code == code, outcome.err
    assert says in " ".join((outcome.out + outcome.err).split())  # lines end at 80 columns
    assert "Traceback" not in outcome.err
    assert {file: file.read_bytes() for file in sorted(place.rglob("*"))} == before


def test_a_damaged_lock_may_be_written_again(place: Path, run: Run) -> None:
    _conflict(place)
    assert run("check", "--update").code == 0
    assert run("check").code == 0


def test_starts_lean(place: Path, run: Run) -> None:
    """Half a second is the bar for starting; none of the packages that take longer than that may be imported."""
    assert run("check", "--update").code == 0
    run_without_importing("torch transformers onnx gguf scipy safetensors", "check", directory=place)


def test_output_without_utf8(place: Path) -> None:
    """A Windows or C-locale console cannot show every character, and must not make the check fail."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    subprocess.run(
        [sys.executable, "-m", "acip_export", "check", "--update"], cwd=place, check=True, capture_output=True
    )
    write_gguf(place / "m.gguf", LARGER)
    for arguments in ([], ["--json"], ["--markdown", "-"]):
        done = subprocess.run(
            [sys.executable, "-m", "acip_export", "check", *arguments],
            capture_output=True,
            cwd=place,
            check=False,
            env=environment,
        )
        assert done.returncode == 6, done.stderr
        assert done.stdout
