"""Several budgets in one call: one export each, what can be shared is made once, and one page compares them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from acip_export import api as pipeline
from acip_export.artifacts.names import COMPARISON_FILE, REPORT_FILE
from acip_export.artifacts.plan import Plan, load_plan
from acip_export.artifacts.report import load_report
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import UsageError
from acip_export.io import kept_until_done
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import problem
from acip_export.planning.candidates import build_candidates
from acip_export.rounding.kept_roundings import KeptRoundings
from acip_export.units import format_nats, parse_budgets
from acip_export.verification import export as verification
from acip_export.verification import reference
from tests.artifacts.examples import PLAN as PLAN_MADE
from tests.support import Run

ASKED = ("-m", "model", "-f", "gguf", "--types", "q8_0,q4_0", "--no-calibrate", "--context", "128")
PLAN = (*ASKED, "--accept-loss")
LADDER = ("--budget", "3500kB..5MB:3")


def whole() -> int:
    return 1000


def test_ladders() -> None:
    assert parse_budgets(["1GB..4GB:3"], whole) == (10**9, 2 * 10**9, 4 * 10**9)
    assert parse_budgets(["8GB", "1GB..4GB:3", "50%"], whole) == (8 * 10**9, 10**9, 2 * 10**9, 4 * 10**9, 500)
    for bad, says in {
        "4GB..1GB:3": "must rise",
        "1GB..4GB:1": "must rise",
        "1GB..4GB:1000": "must rise",
        "1GB..4GB": "is no ladder",
        "1GB..:3": "is no ladder",
        "1..4:3": "no unit",
    }.items():
        with pytest.raises(UsageError, match=says):
            parse_budgets([bad], whole)
    with pytest.raises(UsageError, match="2 budgets are 2GB"):
        parse_budgets(["1GB..4GB:3", "2GB"], whole)


@pytest.mark.slow
def test_one_export_a_budget(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read, known = reference._read_states, list[bool]()

    def watched(file: Path) -> object:
        states = read(file)
        known.append(states is not None)
        return states

    monkeypatch.setattr(reference, "_read_states", watched)
    text = here / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    done = run(*PLAN, *LADDER, "-o", "sizes", "--text", "text.txt", "--json")
    assert done.code == 0, done.err
    assert known == [False, True, True]  # the dense model was passed once
    found = json.loads(done.out)
    names = ["gguf-3.5MB", "gguf-4.18MB", "gguf-5MB"]
    assert [Path(each["out"]).name for each in found] == names
    assert {each.name for each in (here / "sizes").iterdir()} == {*names, COMPARISON_FILE}
    assert [each["plan"]["budget_bytes"] for each in found] == [3_500_000, 4_183_300, 5_000_000]
    losses = [each["plan"]["predicted_loss"] for each in found]
    assert losses == sorted(losses, reverse=True)
    for each in found:
        assert each["report"]["passed"]
        plan = load_plan(here / each["out"] / "plan.json")
        assert plan.used_bytes <= plan.budget_bytes
    page = (here / "sizes" / COMPARISON_FILE).read_text(encoding="utf-8")
    for name in names:
        assert f'<a href="{name}/report.html">{name}</a>' in page
        kl = load_report(here / "sizes" / name / "report.json").runtimes[0].divergence
        assert kl is not None and format_nats(kl.mean_kl) in page
    assert "model.layers.0." in page.partition("Where they differ")[2]
    # A single one is alike, to the byte.
    alone = run(*PLAN, "--budget", "5MB", "-o", "alone", "--no-verify")
    assert alone.code == 0, alone.err
    assert (here / "alone" / "model.gguf").read_bytes() == (here / "sizes" / names[2] / "model.gguf").read_bytes()


@pytest.mark.slow
def test_those_that_are_finished_stay(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that is interrupted goes on with the exports that are not finished."""
    monkeypatch.setattr(kept_until_done, "_WORTH_KEEPING", 0.0)
    export, made, stop = pipeline.export_model, list[int](), 2

    def watched(checkpoint: Checkpoint, scores: ScoreFile, plan: Plan, *given: Any, **named: Any) -> Any:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(plan.budget_bytes)
        return export(checkpoint, scores, plan, *given, **named)

    monkeypatch.setattr(pipeline, "export_model", watched)
    ask = (*PLAN, *LADDER, "-o", "sizes")
    budgets = [3_500_000, 4_183_300, 5_000_000]
    assert run(*ask).code == 130
    assert made == budgets[:2]
    names = ["gguf-3.5MB", "gguf-4.18MB"]
    assert {each.name for each in (here / "sizes").iterdir()} == {*names, ".shared.rounded"}
    # One of them is changed.
    (here / "sizes" / names[0] / "README.md").unlink()
    before = (here / "sizes" / names[1]).stat().st_ino
    stop = 3
    made.clear()
    done = run(*ask, "--force", "--json")
    assert done.code == 0, done.err
    assert "gguf-4.18MB was finished by an earlier run" in caplog.text
    assert made == [budgets[0], budgets[2]]
    assert (here / "sizes" / names[1]).stat().st_ino == before
    assert [each["report"]["passed"] for each in json.loads(done.out)] == [True] * 3
    assert {each.name for each in (here / "sizes").iterdir()} == {*names, "gguf-5MB", COMPARISON_FILE}
    # What is asked for again is made again.
    made.clear()
    assert run(*ask, "--force").code == 0
    assert made == budgets


def test_a_finished_one_whose_report_is_damaged_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A power cut leaves a file without its content."""
    kept, out, made = KeptRoundings(tmp_path / "kept"), tmp_path / "out", list[int]()
    kept.directory.mkdir()
    out.mkdir()

    def export(content: str = "") -> None:
        made.append(len(made))
        (out / REPORT_FILE).write_text(content)

    for _ in range(2):
        assert pipeline.export_once(kept, out, PLAN_MADE, (), export) is None
    assert made == [0, 1]
    assert "it is made again" not in caplog.text and "the export is made again" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_one_whose_task_was_edited_is_another(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def watched(*given: object) -> None:
        seen.append(given[3])
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "export_once", watched)
    task = here / "own.yaml"
    for content in ("task: own", "task: own", "task: own # edited"):
        if not task.exists() or task.read_text() != content:
            task.write_text(content)
        assert run(*PLAN, *LADDER, "-o", "sizes", "--tasks", "own.yaml").code == 130
    first, same, other = seen
    assert first == same != other


def test_the_table_and_what_is_refused(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    build, made = build_candidates, list[object]()

    def counted(*given: Any) -> Any:
        made.append(given)
        return build(*given)

    monkeypatch.setattr(problem, "build_candidates", counted)
    planned = run(*PLAN, "--budget", "4MB", "--budget", "5MB", "--dry-run")
    assert planned.code == 0 and "4.00 MB" in planned.out and "5.00 MB" in planned.out
    assert len(made) == 2  # before anything is measured, and with it
    assert len(json.loads(run(*PLAN, *LADDER, "--dry-run", "--json").out)) == 3
    assert {each.name for each in here.iterdir()} == {"model"}
    assert "one plan is for one --budget" in run("plan", *ASKED, *LADDER).err
    assert "--context is given 2 times" in run(*PLAN, *LADDER, "--context", "64").err
    # One that nothing fits into is refused before anything is written.
    assert run(*PLAN, "--budget", "4MB", "--budget", "4kB", "-o", "out").code == 4
    (here / "out").mkdir(exist_ok=True)
    (here / "out" / COMPARISON_FILE).write_text("mine")
    assert run(*PLAN, *LADDER, "-o", "out").code == 2
    assert (here / "out" / COMPARISON_FILE).read_text() == "mine"


def test_one_that_fails_does_not_stop_the_others(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check = verification._check_agreement
    monkeypatch.setattr(
        verification,
        "_check_agreement",
        lambda known, plan, report: (
            ["it is not what it was"] if plan.budget_bytes == 4_000_000 else check(known, plan, report)
        ),
    )
    done = run(*PLAN, "--budget", "4MB", "--budget", "5MB", "-o", "out")
    assert done.code == 6
    assert "it is not what it was" in done.err and "The export stays in out/gguf-4MB" in done.err
    assert load_report(here / "out" / "gguf-5MB" / "report.json").passed
    assert (here / "out" / "gguf-4MB" / "UNVERIFIED.txt").is_file()
