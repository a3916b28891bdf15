"""All stages report with one type, and the command line draws it."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from acip_export.cli import output
from acip_export.cli.plan_options import PlanFlags
from acip_export.progress import Clock, Course, Journey, Progress

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


def test_a_resumed_stage_without_a_total_takes_what_its_own_steps_say() -> None:
    """A tenth of the rest is done in a moment: nine such moments are left, not what half of the whole would say."""
    seen: list[Progress] = []
    clock = Clock("masks", None, seen.append, done=40, share=0.5)
    time.sleep(0.02)
    clock.advance(share=0.55)
    took = time.perf_counter() - clock._started
    assert seen[0].resumed == 40
    assert 9 * 0.02 <= (seen[0].eta_seconds or 0) <= 9 * took + 1e-6


def test_what_an_earlier_process_did_says_nothing_about_time() -> None:
    watch = Watch()
    journey = Journey(COURSE, watch)
    watch.now = 10.0
    journey(Progress("materialize", 6, 6, resumed=5))  # a sixth of three shares in ten seconds
    assert journey.share == pytest.approx(3 / 8)
    watch.now = 10.0
    assert journey.seconds_left == pytest.approx(100)
    journey(Progress("convert", 1, 1))
    assert journey.seconds_left == pytest.approx(4 * 10 / 1.5)


class Watch:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


COURSE = Course({"materialize": 3, "convert": 1, "verify": 4})


def test_an_estimate_replaces_what_was_expected() -> None:
    watch = Watch()
    journey = Journey(Course({"statistics": 1, "curve": 1}), watch)
    journey.expect(Course({"statistics": 90, "curve": 10}, 100))
    assert journey.seconds_left == pytest.approx(100)
    watch.now = 90.0
    journey(Progress("statistics", 5, 5))
    assert journey.share == pytest.approx(0.9)
    assert journey.seconds_left == pytest.approx(10)


def test_a_first_plan_is_not_done_when_its_first_stage_is() -> None:
    watch = Watch()
    journey = Journey(PlanFlags(format_="gguf", candidates=5, cache_type="auto").course, watch)
    stages = ("types of gguf", "calibrate layers", "calibrate", "KV cache types", "compare plans")
    for number, stage in enumerate(stages):
        watch.now = 10.0 * (number + 1)
        journey(Progress(stage, 7, 7))
        assert journey.share == pytest.approx((1 / 7, 3 / 7, 5 / 7, 6 / 7, 1)[number])
    later = Journey(PlanFlags(format_="gguf").course, watch)  # what is known already is not measured again
    later(Progress("calibrate", 1, 2))
    assert later.share == pytest.approx(0.5)


def test_a_journey_adds_stages_up() -> None:
    watch = Watch()
    journey = Journey(COURSE, watch)
    assert (journey.share, journey.seconds_left, journey.at) == (0, None, None)
    for step in range(1, 7):
        watch.now = 10.0 * step
        journey(Progress("materialize", step, 6))
    assert journey.share == pytest.approx(3 / 8)
    assert journey.seconds_left == pytest.approx(100)  # a minute for three of eight shares
    watch.now += 4
    assert journey.seconds_left == pytest.approx(96)  # counted down while nobody reports
    watch.now += 16
    journey(Progress("convert", 1, 1))
    assert (journey.share, journey.seconds_left) == (0.5, pytest.approx(80))


def test_a_stage_that_is_left_out_is_no_progress() -> None:
    """Nor does its time count: what is to come takes as long as it took before."""
    watch = Watch()
    journey = Journey(COURSE, watch)
    watch.now = 30.0
    journey(Progress("convert", 1, 1))
    assert journey.share == pytest.approx(1 / 5)
    assert journey.seconds_left == pytest.approx(120)


def test_an_estimate_beforehand_is_corrected() -> None:
    watch = Watch()
    journey = Journey(Course(COURSE.shares, seconds=800), watch)
    assert journey.seconds_left == 800
    watch.now = 1.0
    assert journey.seconds_left == 799
    for step in range(1, 4):  # ten times as fast as was thought
        watch.now = 10.0 * step
        journey(Progress("materialize", step, 3))
    assert 50 <= (journey.seconds_left or 0) < 150


def test_stages_that_nobody_foresaw_and_stages_without_a_total() -> None:
    watch = Watch()
    journey = Journey(Course({}), watch)
    watch.now = 5.0
    journey(Progress("graph", 0, 1))
    watch.now = 10.0
    journey(Progress("graph", 1, 1))
    assert journey.share == 1
    journey(Progress("masks", 7, None, eta_seconds=20.0))
    assert 0 < journey.share < 1
    assert journey.seconds_left == 20
    journey(Progress("verify", 0))
    watch.now = 1000.0
    assert journey.seconds_left is None  # later than was thought: nobody can tell how much
    journey(Progress("verify", 1, 2))
    journey(Progress("verify", 1, 2))
    assert 0 < journey.share < 1


def test_one_bar_shows_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=drawn, force_terminal=True, width=80, color_system=None))
    with output.stage_progress(Course({"masks": 1, "convert": 1}, seconds=40.0)) as progress:
        progress(Progress("masks", 7, None, ratio=0.5, loss=3.25, eta_seconds=20.0))
        time.sleep(0.3)
        progress(Progress("convert", 1, 4, "model.layers.17.self_attn.q_proj.weight" * 3))
        time.sleep(0.3)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    assert any("left, masks 7, ratio 0.50, loss 3.250" in line for line in lines)
    assert any("convert 1 of 4, model.layers.17" in line for line in lines)
    assert not any("masks" in line and "convert" in line for line in lines)


def test_without_a_terminal_there_is_a_line_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    written, watch = io.StringIO(), Watch()
    monkeypatch.setattr(output, "err", Console(file=written, force_terminal=False, width=40))
    journey = Journey(COURSE, watch)
    lines = output.ProgressLines(journey, watch)
    for second in range(1, 101):
        watch.now = float(second)
        if second <= 60:
            journey(Progress("materialize", second, 100, loss=3.25, tokens_per_second=1234.0))
        lines.print_due()  # whether or not anything is reported
    assert written.getvalue().splitlines() == [
        "11%, about 4 min left, materialize 30 of 100, loss 3.250, 1,234 tokens/s",
        "22%, about 3 min left, materialize 60 of 100, loss 3.250, 1,234 tokens/s",
        "22%, about 3 min left, materialize 60 of 100, loss 3.250, 1,234 tokens/s",
    ]


def test_a_silent_stage_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own prints, when the work does not report."""
    written = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=written, force_terminal=False))
    monkeypatch.setattr(output, "_SECONDS_BETWEEN_LINES", 1)
    with output.stage_progress() as progress:
        progress(Progress("verify", 0, item="the bundle"))
        time.sleep(3.5)
    lines = written.getvalue().splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.endswith("verify, the bundle") for line in lines)


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
