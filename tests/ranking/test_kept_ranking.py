"""A ranking that is killed goes on with what it had done, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acip_export.artifacts.scores import load_scores
from acip_export.errors import UsageError
from acip_export.io import kept_until_done
from acip_export.io.kept_work import kept_bytes
from acip_export.machine import Machine
from acip_export.model.checkpoint import Checkpoint
from acip_export.model.torch_model import untrained_model
from acip_export.progress import Progress
from acip_export.ranking import rank_model
from acip_export.ranking.algorithms import find_algorithm
from acip_export.ranking.estimate import RankModel
from acip_export.ranking.kept_ranking import origin_of
from acip_export.ranking.processes import Processes
from acip_export.ranking.run_state import run_file
from tests.ranking.support import CALIBRATION, calibration_text
from tests.ranking.test_run_state import QUICK

STATE = ".scores.acip.rank-state"
SHORT = replace(CALIBRATION, statistics_tokens=1024, gradient_tokens=512, curve_tokens=256, self_tokens=3072)


class Interrupted:
    """Counts reports by stage, and interrupts at the ``at``-th of a stage, or of all."""

    def __init__(self, at: int = 0, stage: str = "") -> None:
        self.at, self.stage = at, stage
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        if self.at and len(self.of(self.stage) if self.stage else self.seen) == self.at:
            os.kill(os.getpid(), signal.SIGINT)

    def of(self, stage: str) -> list[Progress]:
        return [progress for progress in self.seen if progress.stage == stage]


@pytest.fixture
def _kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_until_done, "_WORTH_KEEPING", 0.0)


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
from acip_export.ranking import rank_model
from tests.ranking.test_kept_ranking import SHORT
torch.set_num_threads(1)
def kill(progress):
    if progress.stage == sys.argv[4] and progress.done >= int(sys.argv[5]):
        os.kill(os.getpid(), signal.SIGKILL)
rank_model(sys.argv[1], sys.argv[2], algorithm="fisher", calibration=SHORT, out=Path(sys.argv[3]), progress=kill)
"""


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Interrupted]:
    file, reports = tmp_path_factory.mktemp("whole") / "scores.acip", Interrupted()
    rank_model(model, text, algorithm="fisher", calibration=SHORT, out=file, progress=reports)
    return file.read_bytes(), reports


@pytest.mark.slow
def test_killed_it_goes_on(model: Path, text: Path, tmp_path: Path, whole: tuple[bytes, Interrupted]) -> None:
    """SIGKILL on the way back through the blocks, then among the factors: each time only the rest is computed."""
    out, total = tmp_path / "scores.acip", whole[1].of("statistics")[-1].done
    for stage, done in (("statistics", total - 8), ("components", 10)):
        command = [sys.executable, "-c", SCRIPT, model, text, out, stage, str(done)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not out.exists() and (tmp_path / STATE / "journal").exists()
    rest = Interrupted()
    rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=rest)
    assert rest.of("statistics") == []
    assert [progress.done for progress in rest.of("components")] == list(range(8, 15))  # of the second block
    assert out.read_bytes() == whole[0]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip"]


@pytest.mark.usefixtures("_kept_at_once")
@pytest.mark.parametrize("stage", ["statistics", "components", "fisher", "curve"])
def test_blocks_that_are_done_are_not_computed_again(
    model: Path, text: Path, tmp_path: Path, whole: tuple[bytes, Interrupted], stage: str
) -> None:
    out, reports = tmp_path / "scores.acip", whole[1].of(stage)
    with pytest.raises(KeyboardInterrupt):
        first = Interrupted(at=len(reports) * 3 // 4, stage=stage)
        rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=first)
    assert [file.name for file in tmp_path.iterdir()] == [STATE]
    rest = Interrupted()
    rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=rest)
    assert len(rest.of(stage)) <= len(reports) * 2 // 3
    earlier = [seen.stage for seen in first.seen if seen.stage != stage]
    assert not {*earlier} & {seen.stage for seen in rest.seen}
    assert out.read_bytes() == whole[0]
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip"]


@pytest.mark.usefixtures("_kept_at_once")
@pytest.mark.parametrize(
    ("algorithm", "source"),
    [
        ("kfac", "text"),
        ("first-order", "self"),
        pytest.param("energy", "self", marks=pytest.mark.slow),
        pytest.param("acip", "text", marks=pytest.mark.slow),
        pytest.param("acip", "self", marks=pytest.mark.slow),
    ],
)
def test_interrupted_again_and_again(model: Path, text: Path, tmp_path: Path, algorithm: str, source: str) -> None:
    data: str | Path = text if source == "text" else "self"
    acip = QUICK if algorithm == "acip" else None

    def rank(out: Path, progress: Callable[[Progress], None]) -> None:
        options = {"acip": acip, "calibration": SHORT, "resume": run_file(out).exists()}
        rank_model(model, data, algorithm=algorithm, out=out, progress=progress, **options)

    reports = Interrupted()
    rank(tmp_path / "whole.acip", reports)
    out, count = tmp_path / "scores.acip", 0
    while not out.exists():
        try:
            rank(out, Interrupted(at=15))
        except KeyboardInterrupt:
            count += 1
        assert count <= len(reports.seen) // 5
    assert count >= 3
    assert out.read_bytes() == (tmp_path / "whole.acip").read_bytes()
    assert not (tmp_path / STATE).exists()


@pytest.mark.usefixtures("_kept_at_once")
def test_what_is_of_another_text_or_damaged_is_not_used(
    model: Path, text: Path, tmp_path: Path, whole: tuple[bytes, Interrupted], caplog: pytest.LogCaptureFixture
) -> None:
    out, other = tmp_path / "scores.acip", calibration_text(tmp_path / "other.txt", 50)
    for data in (other, text):
        with pytest.raises(KeyboardInterrupt):
            rank_model(model, data, algorithm="fisher", calibration=SHORT, out=out, progress=Interrupted(5, "curve"))
    assert len([record for record in caplog.records if "another model, text or settings" in record.message]) == 1
    factors = tmp_path / STATE / "factors"
    factors.write_bytes(b"\0" * factors.stat().st_size)
    rest = Interrupted()
    rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=rest)
    assert len(rest.seen) == len(whole[1].seen)
    assert "is damaged" in caplog.text and out.read_bytes() == whole[0]


@pytest.mark.usefixtures("_kept_at_once")
def test_curve_of_other_adapters_is_measured_again(model: Path, text: Path, tmp_path: Path) -> None:
    """They are learned after the scores, which are the same."""
    out, whole, longer = tmp_path / "scores.acip", tmp_path / "whole.acip", replace(QUICK, post_tune=7)
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, acip=QUICK, calibration=SHORT, out=out, progress=Interrupted(20, "curve"))
    rank_model(model, text, acip=longer, calibration=SHORT, out=whole)
    rank_model(model, text, acip=longer, calibration=SHORT, out=out)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.usefixtures("_kept_at_once")
@pytest.mark.parametrize(
    ("algorithm", "stage", "count"),
    [("fisher", "components", 9), pytest.param("acip", "masks", 3, marks=pytest.mark.slow)],
)
def test_what_was_fitted_to_a_time_goes_on_as_it_was(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, stage: str, count: int
) -> None:
    """The machine seems to be faster, or slower, when the command is given again."""
    slow = Machine(1e7, 1e7, 1e3, 2)
    monkeypatch.setattr(Machine, "measured", lambda _width: slow)
    acip = replace(QUICK, post_tune=150) if algorithm == "acip" else None
    whole = RankModel(Checkpoint.open(model)).estimate(SHORT, find_algorithm(algorithm), acip, slow)
    options = {"algorithm": algorithm, "acip": acip, "calibration": SHORT, "seconds": 0.8 * whole.total_seconds}
    rank_model(model, text, out=tmp_path / "whole.acip", **options)  # type: ignore[arg-type]
    out, said = tmp_path / "scores.acip", list[str]()
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, out=out, progress=Interrupted(count, stage), **options)  # type: ignore[arg-type]
    monkeypatch.setattr(Machine, "measured", lambda _width: Machine(3e7, 3e7, 1e3, 2))
    rank_model(model, text, out=out, resume=algorithm == "acip", announce=said.append, **options)  # type: ignore[arg-type]
    assert any("that an earlier run has fitted" in line for line in said)
    assert out.read_bytes() == (tmp_path / "whole.acip").read_bytes()
    with pytest.raises(UsageError, match="none that was fitted to this time is kept"):
        rank_model(model, text, acip=QUICK, out=tmp_path / "new.acip", resume=True, seconds=1e6)


def test_moments_work_leaves_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.acip"
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=Interrupted(3, "curve"))
    assert list(tmp_path.iterdir()) == []


def test_scores_can_be_used_when_their_state_is_gone(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.acip"
    scores = rank_model(model, text, algorithm="kfac", calibration=SHORT, out=out)
    stored = load_scores(out)
    for key in stored.second_moments:
        assert scores.second_moments[key].digest == stored.second_moments[key].digest


def test_room_is_what_was_estimated(model: Path, text: Path, tmp_path: Path) -> None:
    out, most = tmp_path / "scores.acip", 0

    def look(_progress: Progress) -> None:
        nonlocal most
        most = max(most, kept_bytes(out))

    rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=look)
    checkpoint, fisher = Checkpoint.open(model), find_algorithm("fisher")
    estimate = RankModel(checkpoint).estimate(SHORT, fisher, None, Machine(1e11, 5e10, 1e6, 2))
    assert 0.3 * estimate.disk < most <= estimate.disk


@pytest.mark.slow
def test_another_process_does_not_use_it(model: Path, text: Path, tmp_path: Path) -> None:
    """A second ranking into the same file is refused while the first runs."""
    out = tmp_path / "scores.acip"
    script = SCRIPT.replace("calibration=SHORT", "calibration=SHORT, force=True")
    refused: list[str] = []

    def start(progress: Progress) -> None:
        if progress.stage == "components" and progress.done == 1:
            command = [sys.executable, "-c", script, model, text, out, "none", "0"]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            refused.append(done.stderr)

    rank_model(model, text, algorithm="fisher", calibration=SHORT, out=out, progress=start)
    assert "is being written by another acip-export" in refused[0].replace("\n", " ")


def test_whole_and_sharded_models_take_other_batches(model: Path) -> None:
    """What one of them has kept is of windows that the other has elsewhere."""
    checkpoint = Checkpoint.open(model)
    dense, whole = untrained_model(checkpoint.config), Processes(0, 2, torch.device("cpu"))
    sharded = replace(whole, mesh=object())  # type: ignore[arg-type]

    def origin(processes: Processes) -> str:
        return origin_of(checkpoint, dense, None, SHORT, "kfac", False, processes, "float32")

    assert origin(whole) == origin(replace(whole, index=1)) != origin(sharded)
