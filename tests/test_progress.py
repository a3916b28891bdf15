"""All stages report with one type, and the command line draws it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from acip_export.cli import output
from acip_export.progress import Clock, Progress

ROOT = Path(__file__).parents[1]


def test_a_clock_counts_to_the_total() -> None:
    seen: list[Progress] = []
    clock = Clock("statistics", 3, seen.append, tokens=100)
    for _ in range(3):
        clock.advance(loss=2.5)
    assert [(p.stage, p.done, p.total, p.loss, p.ratio) for p in seen] == [
        ("statistics", done, 3, 2.5, None) for done in (1, 2, 3)
    ]
    assert seen[0].eta_seconds and seen[-1].eta_seconds == 0
    assert all(p.tokens_per_second and p.tokens_per_second > 0 for p in seen)


def test_a_resumed_stage_counts_on_and_measures_its_own_speed() -> None:
    seen: list[Progress] = []
    Clock("post-tune", 10, seen.append, done=8).advance()
    assert seen[0].done == 9 and seen[0].tokens_per_second is None
    Clock("masks", None, seen.append, done=8).advance(share=1.0)
    assert seen[1].total is None and seen[1].eta_seconds == 0
    Clock("masks", None, seen.append).advance()
    assert seen[2].eta_seconds is None  # nobody can tell yet


def test_bars_show_what_a_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=drawn, force_terminal=True, width=200, color_system=None))
    with output.stage_progress() as progress:
        progress(Progress("convert", 1, 4, "blk.0.attn_q.weight"))
        progress(
            Progress("masks", 7, None, ratio=0.5, loss=3.25, tokens_per_second=1234.0, eta_seconds=20.0),
        )
    text = drawn.getvalue()
    assert "convert" in text and "1/4" in text and "blk.0.attn_q.weight" in text
    assert "ratio 0.50  loss 3.250  1,234 tokens/s  about 20 s left" in text


def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    written, now = io.StringIO(), 0.0
    monkeypatch.setattr(output, "err", Console(file=written, force_terminal=False, width=40))
    lines = output.ProgressLines(lambda: now)
    for step in range(1, 401):  # one a second
        now = float(step)
        lines(Progress("statistics", step, 400, loss=3.25, tokens_per_second=1234.0))
    for step in range(1, 61):
        now = 400.0 + step
        lines(Progress("masks", step, None, eta_seconds=7500.0))
    assert written.getvalue().splitlines() == [
        *(
            f"statistics {step} of 400, loss 3.250, 1,234 tokens/s, about {left} left"
            for step, left in (
                (60, "6 min"),
                (120, "5 min"),
                (180, "4 min"),
                (240, "3 min"),
                (300, "2 min"),
                (360, "40 s"),
            )
        ),
        "masks 20, about 2 h 5 min left",
    ]


def test_short_work_prints_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=written, force_terminal=False))
    with output.stage_progress() as progress:
        for step in range(100):
            progress(Progress("convert", step, 100))
    assert written.getvalue() == ""


def test_there_is_one_type_of_progress() -> None:
    for file in [*(ROOT / "acip_export").rglob("*.py"), *(ROOT / "converters").rglob("*.py")]:
        if file.name != "progress.py":
            source = file.read_text(encoding="utf-8")
            assert not re.search(r"class \w*Progress\b|progress: Callable|StageProgress", source), file
