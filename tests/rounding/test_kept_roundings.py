"""What an export was rounded to is not rounded again: when it is verified, and after its process was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export.api import shared_work
from acip_export.formats.registry import export_format
from acip_export.io.atomic import new_file
from acip_export.io.processes import module_environment
from acip_export.rounding import error_feedback, kept_roundings
from acip_export.rounding.kept_roundings import KeptRoundings, roundings_beside
from tests.gguf.test_feedback import matrix, moment, moments_of
from tests.ranking.support import CALIBRATION
from tests.support import CORPUS, Run, make_model, make_scores

TYPES = {"gguf": "q4_0", "onnx": "int4"}


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_matrix_is_rounded_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round_trip, type = export_format(name).round_trip, TYPES[name]
    weight, inputs = matrix(48), moments_of(moment(256, 8, 0))
    expected = round_trip(weight, type, inputs)
    keeping = replace(inputs, kept=KeptRoundings(tmp_path))
    assert torch.equal(round_trip(weight.bfloat16(), type, keeping), round_trip(weight.bfloat16(), type, inputs))
    assert torch.equal(round_trip(weight, type, keeping), expected)
    assert len(list(tmp_path.iterdir())) == 2
    rounded: list[int] = []
    once = error_feedback._round_block

    def counted(*arguments: object) -> None:
        rounded.append(1)
        once(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(error_feedback, "_round_block", counted)
    assert torch.equal(round_trip(weight, type, keeping), expected)
    assert not rounded
    # Whatever else it depends on makes it another one.
    other = moments_of(moment(256, 8, 1))
    for changed in (replace(keeping, importance=other.importance), replace(keeping, feedback=other.feedback)):
        assert torch.equal(round_trip(weight, type, changed), round_trip(weight, type, replace(changed, kept=None)))
    assert torch.equal(round_trip(weight.flip(0), type, keeping), round_trip(weight.flip(0), type, inputs))
    assert len(list(tmp_path.iterdir())) == 5
    assert rounded


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_large_one_is_rounded_to_the_nearest_codes_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_trip, type = export_format(name).round_trip, TYPES[name]
    weight, inputs = matrix(48), replace(moments_of(moment(256, 8, 0)), feedback=None)
    expected, keeping = round_trip(weight, type, inputs), replace(inputs, kept=KeptRoundings(tmp_path))
    assert torch.equal(round_trip(weight, type, keeping), expected)
    assert not list(tmp_path.iterdir())  # a small one
    monkeypatch.setattr(kept_roundings, "_LARGE", weight.numel() - 1)
    assert torch.equal(round_trip(weight, type, keeping), expected)
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as nothing_computed:
        nothing_computed.delattr(KeptRoundings, "timed")
        assert torch.equal(round_trip(weight, type, keeping), expected)
    unimportant = replace(keeping, importance=None)
    assert torch.equal(round_trip(weight, type, unimportant), round_trip(weight, type, None))
    assert len(list(tmp_path.iterdir())) == 2


def _fill(kept: KeptRoundings, value: int = 1) -> int:
    """Ask for one matrix; returns how often it was computed."""
    factor = moments_of(moment(256, 8, 0)).feedback
    assert factor is not None
    computed = []

    def compute() -> list[np.ndarray]:
        computed.append(1)
        return [np.full(4, value)]

    (found,) = kept.arrays(matrix(2), "q4_0", None, factor, compute)
    assert found.tolist() == [value] * 4
    return len(computed)


def test_beside_an_export_they_outlive_a_kill_and_long_work_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out"
    with roundings_beside(target, "a") as kept:
        assert _fill(kept) == 1 and _fill(kept) == 0
    assert list(tmp_path.iterdir()) == []
    for ending, seconds, stays in (
        (ValueError, 100, False),
        (KeyboardInterrupt, 1, False),
        (KeyboardInterrupt, 100, True),
    ):
        with pytest.raises(ending), roundings_beside(target, "a") as kept:
            assert _fill(kept) == 1
            kept.seconds = seconds
            raise ending
        assert [file.name for file in tmp_path.iterdir()] == ([".out.rounded"] if stays else [])
    assert "the same command goes on, and so does  verify" in caplog.text
    with pytest.raises(KeyboardInterrupt), roundings_beside(target, "a") as kept:
        assert "going on with what an earlier run has rounded: 1 pieces" in caplog.text
        assert _fill(kept) == 0
        (file,) = kept.directory.glob("*.npz")
        file.write_bytes(file.read_bytes()[:-30])  # a power cut
        assert _fill(kept) == 1 and _fill(kept) == 0
        raise KeyboardInterrupt
    with roundings_beside(target, "another plan") as kept:
        assert _fill(kept, 2) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_piece_counts_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that is killed leaves it in a hidden directory; here, one that is still writing."""
    target = tmp_path / "export"
    with roundings_beside(target, "a") as kept:
        writing = new_file(kept.directory / "half.npz")
        writing.__enter__()
        with pytest.raises(KeyboardInterrupt), roundings_beside(target, "a"):
            raise KeyboardInterrupt
        assert not kept.directory.exists()
    assert "going on" not in caplog.text


def test_parts_of_plans_outlive_a_kill(tmp_path: Path) -> None:
    parts, other = (KeptRoundings(tmp_path).parts(name) for name in ("a", "b"))
    assert "up weight" not in parts
    parts.write("up weight", np.arange(6).reshape(2, 3))
    again = KeptRoundings(tmp_path).parts("a")
    assert "up weight" in again and "down weight" not in again and "up weight" not in other
    assert again.read("up weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    for damaged in (b"", whole[:-20], whole.replace(b"\x05\0\0\0\0\0\0\0", b"\x04\0\0\0\0\0\0\0")):
        assert damaged != whole
        file.write_bytes(damaged)
        assert "up weight" not in again
    parts.write("up weight", np.ones(2))
    assert again.read("up weight").tolist() == [1, 1]
    other.close()
    parts.close()
    assert list(tmp_path.iterdir()) == []


def test_several_sizes_share_what_outlives_a_kill(tmp_path: Path) -> None:
    scores = make_scores(make_model(tmp_path / "tiny"))
    sizes = tmp_path / "sizes"
    with pytest.raises(KeyboardInterrupt), shared_work(sizes, ["gguf", "gguf"], scores, None) as (cache, kept):
        assert cache is not None and kept is not None
        assert _fill(kept) == 1
        kept.seconds = 100
        raise KeyboardInterrupt
    with shared_work(sizes, ["gguf"], scores, None) as (cache, kept):
        assert kept is not None and _fill(kept) == 0
        assert cache is not None and kept.directory in cache.parents
    assert list(sizes.iterdir()) == []
    with shared_work(None, ["gguf"], scores, tmp_path) as shared:
        assert shared == (tmp_path, None)


@pytest.mark.slow
def test_a_killed_export_goes_on_to_the_same_bytes(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    from acip_export.ranking import rank_model

    model = make_model(tmp_path / "tiny", num_hidden_layers=4)
    (tmp_path / "text.txt").write_text("".join(CORPUS) * 6, encoding="utf-8")
    rank_model(model, tmp_path / "text.txt", algorithm="kfac", calibration=CALIBRATION, out=model / "tiny.acip")
    ask = ("--model", model, "--budget", "2MB", "--budget-scope", "file", "--format", "gguf", "--types", "q5_0,q4_0")
    ask = (*ask, "--context", 64, "--no-calibrate", "--text", tmp_path / "text.txt")
    whole = run(*ask, "-o", tmp_path / "whole")
    assert whole.code == 0, whole.err
    command = [sys.executable, "-m", "acip_export", *map(str, ask), "-o", str(tmp_path / "out")]
    kept = tmp_path / ".out.rounded"
    process = subprocess.Popen(command, env=module_environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(kept.glob("*.npz"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    if (tmp_path / "out").exists():
        pytest.fail("it was done before it could be killed")
    again = run(*ask, "-o", tmp_path / "out")
    assert again.code == 0, again.err
    assert "going on with what an earlier run has rounded" in caplog.text
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()
    assert not kept.exists()
    # An interrupted verification is gone on with by  verify.
    kept.mkdir()
    (kept / "origin").write_text("of another plan")
    verified = run("verify", tmp_path / "out", "--model", model, "--text", tmp_path / "text.txt")
    assert verified.code == 0, verified.err
    assert not kept.exists()
