"""A run that is stopped and resumed ends with the ranking of the whole run, to the byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from acip_export.errors import RankingError, UsageError
from acip_export.files import read_safetensors_header
from acip_export.rank import AcipConfig, Progress, rank_model
from acip_export.rank.acip import AcipRun
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


@pytest.mark.parametrize("seconds", [0.0, 0.15])
def test_killed_run_resumes_to_the_same_ranking(
    model: Path, text: Path, tmp_path: Path, whole: Path, seconds: float
) -> None:
    """SIGKILL, which nothing can catch, twice in one run, wherever it falls after the first checkpoint."""
    out = tmp_path / "scores.acip"
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from acip_export.rank import rank_model\n"
        "from tests.rank.support import CALIBRATION\n"
        "from tests.rank.test_resume import QUICK\n"
        "torch.set_num_threads(1)\n"
        "model, text, out = map(Path, sys.argv[1:4])\n"
        "rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, checkpoint_every=2,\n"
        "           resume=len(sys.argv) > 4)\n"
    )
    stored = tmp_path / "scores.acip.run"
    for resume in ([], ["resume"]):
        before = stored.stat().st_mtime_ns if resume else None
        process = subprocess.Popen([sys.executable, "-c", script, model, text, out, *resume])
        deadline = time.monotonic() + 120
        while process.poll() is None and (not stored.exists() or stored.stat().st_mtime_ns == before):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(seconds)
        process.kill()
        process.wait()
        if out.exists():  # it was done before the signal came
            break
        assert stored.exists()
    if not out.exists():
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


def test_diverged_run_names_its_last_good_state(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real divergence: from the fifth step on the optimizer takes steps of 1e30."""
    step = AcipRun.mask_step

    def reckless(run: AcipRun) -> float:
        if run.mask_steps == 4:
            for group in run.optimizer.param_groups:
                group["lr"] = 1e30
        return step(run)

    monkeypatch.setattr(AcipRun, "mask_step", reckless)
    with pytest.raises(RankingError, match=r"(?s)loss is .*learning rate.*last good state is in .*scores\.acip\.run"):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=tmp_path / "scores.acip", checkpoint_every=1)
    # The state after the reckless step was still finite; it is not the one that was kept.
    _, metadata = read_safetensors_header(tmp_path / "scores.acip.run", RankingError)
    assert json.loads(metadata["counters"])["mask_steps"] == 4
    assert not (tmp_path / "scores.acip").exists()


def test_run_that_diverges_at_once_has_no_good_state(model: Path, text: Path, tmp_path: Path) -> None:
    absurd = replace(QUICK, learning_rate=1e30, start="ones")
    with pytest.raises(RankingError, match=r"loss is nan at step 2.*\n.*learning rate \(now 1e\+30\)$"):
        rank_model(model, text, acip=absurd, calibration=CALIBRATION, out=tmp_path / "a.acip", checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_finished_run_stays(whole: Path) -> None:
    load_scores(whole)
    assert [file.name for file in whole.parent.iterdir()] == ["scores.acip"]
