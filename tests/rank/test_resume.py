"""A run that is stopped and resumed ends with the ranking of the whole run, to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from acip_export.errors import RankingError, UsageError
from acip_export.rank import AcipConfig, Progress, rank_model
from acip_export.scores import load_scores
from tests.rank.support import CALIBRATION

QUICK = AcipConfig(
    basis="kfac",
    start="drop-loss",
    learning_rate=2e-3,
    penalty=3e-2,
    penalty_growth=1.5,
    post_tune=6,
    post_tune_sizes="sampled",
    batch=2,
    adapter_rank=4,
)


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("whole") / "scores.acip"
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=file)
    return file


def stop_at(phase: str, step: int) -> object:
    def callback(progress: Progress) -> None:
        if (progress.phase, progress.step) == (phase, step):
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.parametrize(("phase", "step"), [("masks", 5), ("post-tune", 3)])
def test_resumed_run_gives_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, whole: Path, phase: str, step: int
) -> None:
    out = tmp_path / "scores.acip"
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, progress=stop_at(phase, step))
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip.run"]
    seen: list[Progress] = []
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True, progress=seen.append)
    assert next(p.step for p in seen if p.phase == phase) == step + 1
    assert out.read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip"]


def test_killed_run_resumes_from_its_last_checkpoint(model: Path, text: Path, tmp_path: Path, whole: Path) -> None:
    """SIGKILL, which nothing can catch, in a process of its own."""
    out = tmp_path / "scores.acip"
    script = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from acip_export.rank import rank_model\n"
        "from tests.rank.support import CALIBRATION\n"
        "from tests.rank.test_resume import QUICK\n"
        "torch.set_num_threads(1)\n"
        "def slow(p):\n"
        "    if p.phase == 'masks' and p.step == 11:\n"
        "        time.sleep(60)\n"
        "model, text, out = map(Path, sys.argv[1:])\n"
        "rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, checkpoint_every=4, progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, model, text, out])
    stored = tmp_path / "scores.acip.run"
    deadline = time.monotonic() + 60
    while not (stored.exists() and b'"mask_steps": 8' in stored.read_bytes().replace(b"\\", b"")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_only_the_same_run_is_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.acip"
    with pytest.raises(RankingError, match="no stored run"):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True)
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, progress=stop_at("masks", 1))
    stored = tmp_path / "scores.acip.run"
    with pytest.raises(RankingError, match="another model, text or settings"):
        rank_model(model, text, acip=replace(QUICK, stop_ratio=0.5), calibration=CALIBRATION, out=out, resume=True)
    stored.write_bytes(stored.read_bytes()[:-10])
    with pytest.raises(RankingError, match="truncated"):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True)
    with pytest.raises(UsageError, match="only a run of acip"):
        rank_model(model, text, algorithm="kfac", calibration=CALIBRATION, out=out, resume=True)


def test_diverged_run_names_its_last_good_state(model: Path, text: Path, tmp_path: Path) -> None:
    reckless = replace(QUICK, learning_rate=1e30, start="ones")
    with pytest.raises(RankingError, match=r"(?s)loss is .*learning rate.*last good state is in .*scores\.acip\.run"):
        rank_model(
            model, text, acip=reckless, calibration=CALIBRATION, out=tmp_path / "scores.acip", checkpoint_every=1
        )
    assert not (tmp_path / "scores.acip").exists()


def test_nothing_of_a_finished_run_stays(whole: Path) -> None:
    load_scores(whole)
    assert [file.name for file in whole.parent.iterdir()] == ["scores.acip"]
