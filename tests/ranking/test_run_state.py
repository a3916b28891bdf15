"""A run that is stopped and resumed ends with the ranking of the whole run, to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acip_export.artifacts.scores import load_scores
from acip_export.errors import RankingError, UsageError
from acip_export.io.atomic import read_safetensors_header
from acip_export.progress import Progress
from acip_export.ranking import AcipConfig, rank_model
from acip_export.ranking.acip_run import AcipRun
from acip_export.ranking.processes import ALONE
from acip_export.ranking.run_state import RunStates
from tests.planning.problems import examples
from tests.ranking.support import CALIBRATION

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


def stop_at(stage: str, step: int) -> object:
    def callback(progress: Progress) -> None:
        if (progress.stage, progress.done) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.parametrize(("stage", "step"), [("masks", 5), ("post-tune", 3)])
def test_resumed_run_gives_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, whole: Path, stage: str, step: int
) -> None:
    out = tmp_path / "scores.acip"
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, progress=stop_at(stage, step))
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip.run"]
    seen: list[Progress] = []
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True, progress=seen.append)
    assert next(p.done for p in seen if p.stage == stage) == step + 1
    assert out.read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip"]


SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
import safetensors.torch
from acip_export.ranking import rank_model
from tests.ranking.support import CALIBRATION
from tests.ranking.test_run_state import QUICK
torch.set_num_threads(1)
model, text, out = map(Path, sys.argv[1:4])
options, left = sys.argv[4].split(","), int(sys.argv[5])
save = safetensors.torch.save_file
def save_or_die(tensors, file, metadata):
    global left
    save(tensors, file, metadata)
    left -= 1
    if left == 0:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = save_or_die
rank_model(
    model, text, acip=QUICK, calibration=CALIBRATION, out=out, store_seconds=0, resume="resume" in options
)
"""


def start(model: Path, text: Path, out: Path, killed_in_save: int = 0) -> subprocess.Popen[bytes]:
    """A ranking in a process of its own, resumed if there is something to resume; 0: it is not killed while saving."""
    options = "resume" if (out.parent / "scores.acip.run").exists() else ""
    return subprocess.Popen([sys.executable, "-c", SCRIPT, model, text, out, options, str(killed_in_save)])


@pytest.mark.slow
def test_killed_while_it_stores_its_state(model: Path, text: Path, tmp_path: Path, whole: Path) -> None:
    """SIGKILL, which nothing can catch, when half of the third state is on the disk: the second one is whole."""
    out = tmp_path / "scores.acip"
    assert start(model, text, out, killed_in_save=3).wait(timeout=1000) == -signal.SIGKILL
    left = {file.name for file in tmp_path.iterdir()} - {".scores.acip.lock", ".scores.acip.rank-state"}
    assert "scores.acip.run" in left and len(left) == 2  # and half a state under another name
    _, metadata = read_safetensors_header(tmp_path / "scores.acip.run", RankingError)
    assert json.loads(metadata["counters"])["mask_steps"] == 2
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["scores.acip"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(examples(1, 5)))
def test_killed_at_any_moment_it_resumes_to_the_same_ranking(
    model: Path, text: Path, tmp_path: Path, whole: Path, seed: int
) -> None:
    out = tmp_path / "scores.acip"
    moments = random.Random(seed)
    kills = examples(1, 5)
    while not out.exists():
        process = start(model, text, out)
        if kills:
            kills -= 1
            deadline = time.monotonic() + 1000
            while process.poll() is None and not any(tmp_path.iterdir()):  # libraries are being loaded
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 3))
            process.kill()
            process.wait()
        else:
            assert process.wait(timeout=1000) == 0
    assert out.read_bytes() == whole.read_bytes()
    # The signal may have come when all was written and nothing cleaned up.
    if process.returncode == 0:
        assert [file.name for file in tmp_path.iterdir()] == ["scores.acip"]


def test_states_are_stored_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 50 seconds, by a clock that stands still otherwise: a third one would end after two minutes."""
    now = 0.0
    monkeypatch.setattr("acip_export.ranking.run_state.time.monotonic", lambda: now)
    run = _Stored()
    states, rare, always = (RunStates(tmp_path / str(s), s, False) for s in (120.0, 1e9, 0.0))
    stored = []
    for step in range(1, 7):
        now += 50
        assert always.due() and not rare.due()
        if states.due():
            states.save(run, "identity")
            now += 7  # to write takes time that is no step
            stored.append(step)
    assert stored == [2, 4, 6]


class _Stored:
    """Something to store."""

    processes = ALONE

    def check(self) -> None: ...
    def counters(self) -> dict[str, object]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"mask": torch.zeros(1)}

    def restore(self, counters: object, tensors: object) -> None: ...


def test_run_is_stored_when_it_is_learned(model: Path, text: Path, tmp_path: Path, whole: Path) -> None:
    """Killed while its curve is measured, it need not learn again."""
    out = tmp_path / "scores.acip"
    with pytest.raises(KeyboardInterrupt):
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, progress=stop_at("curve", 1))
    seen: list[Progress] = []
    rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=out, resume=True, progress=seen.append)
    assert {"masks", "post-tune"}.isdisjoint(p.stage for p in seen) and out.read_bytes() == whole.read_bytes()


def test_only_the_same_run_is_resumed(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.acip"
    with pytest.raises(RankingError, match="no run state"):
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
        rank_model(model, text, acip=QUICK, calibration=CALIBRATION, out=tmp_path / "scores.acip", store_seconds=0)
    # The state after the reckless step was still finite; it is not the one that was kept.
    _, metadata = read_safetensors_header(tmp_path / "scores.acip.run", RankingError)
    assert json.loads(metadata["counters"])["mask_steps"] == 4
    assert not (tmp_path / "scores.acip").exists()


def test_run_that_diverges_at_once_has_no_good_state(model: Path, text: Path, tmp_path: Path) -> None:
    absurd = replace(QUICK, learning_rate=1e30, start="ones")
    with pytest.raises(RankingError, match=r"loss is nan at step 2.*\n.*learning rate \(now 1e\+30\)$"):
        rank_model(model, text, acip=absurd, calibration=CALIBRATION, out=tmp_path / "a.acip", store_seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_finished_run_stays(whole: Path) -> None:
    load_scores(whole)
    assert [file.name for file in whole.parent.iterdir()] == ["scores.acip"]
