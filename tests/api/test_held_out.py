"""What quality is measured on when the user names no text: what the ranking held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import acip_export
from acip_export.api import calibration
from acip_export.api.text import held_out_text
from acip_export.artifacts.scores import ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking import data as ranking_data
from acip_export.ranking.config import DataConfig
from tests.support import make_model

CONTEXT = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=1)


@pytest.fixture(scope="module")
def scores(model: Path, text: Path) -> ScoreFile:
    return acip_export.rank(model, text, out=model / "m.acip", algorithm="kfac", context=CONTEXT)


def test_it_is_the_end_of_the_text_which_nothing_was_calibrated_on(model: Path, text: Path, scores: ScoreFile) -> None:
    checkpoint = Checkpoint.open(model)
    held_out = ranking_data.read_data(checkpoint, text, DataConfig(context=CONTEXT)).held_out
    assert scores.data.held_out == len(held_out)
    found = held_out_text(checkpoint, scores, CONTEXT)
    assert found is not None
    assert np.array_equal(found.windows, held_out.numpy()[: len(found.windows)])
    assert found.source == "text.txt, its end, held out from the ranking" and found.sha256 == scores.data.sha256
    # Cut anew for an export with another context: the same tokens in the same order.
    longer = held_out_text(checkpoint, scores, 2 * CONTEXT)
    assert longer is not None and longer.windows.shape[1] == 2 * CONTEXT
    assert np.array_equal(longer.windows.flatten(), held_out.numpy().flatten()[: longer.windows.size])


def test_few_tokens_are_of_many_pages(model: Path, scores: ScoreFile, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(model)
    monkeypatch.setattr(calibration, "_WINDOW", 8)
    whole = held_out_text(checkpoint, scores, 8)
    assert whole is not None
    pages, long = whole.windows.shape
    assert pages >= 8
    monkeypatch.setattr(calibration, "_TOKENS", 2 * long)
    monkeypatch.setattr(calibration, "_LEAST_TOKENS", 0)
    for least, places in ((long, [0, pages // 2]), (long // 2, [0, pages // 4, pages // 2, pages * 3 // 4])):
        windows, sha256 = calibration.held_out_windows(checkpoint, scores, 1, least)
        assert np.array_equal(windows, whole.windows[places, :least]) and sha256 == whole.sha256


def test_a_text_of_its_own_is_found(model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    scores = acip_export.rank(model, text, out=tmp_path / "s.acip", algorithm="kfac", context=CONTEXT, evaluation=other)
    assert acip_export.load_scores(tmp_path / "s.acip").data == scores.data
    found = held_out_text(Checkpoint.open(model), scores, CONTEXT)
    assert found is not None and found.source == "other.txt, held out from the ranking"
    assert found.sha256 == scores.data.evaluation_sha256 != scores.data.sha256


def test_no_other_text_passes_for_it(
    model: Path, text: Path, scores: ScoreFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(model)
    monkeypatch.chdir(tmp_path)
    named = replace(scores, data=replace(scores.data, source="text.txt"), file=tmp_path / "m.acip")
    assert held_out_text(checkpoint, named, CONTEXT) is None  # it is not there
    (tmp_path / "text.txt").write_text(text.read_text())
    assert held_out_text(checkpoint, named, CONTEXT) is not None
    (tmp_path / "text.txt").write_text(text.read_text() + "More.")
    assert held_out_text(checkpoint, named, CONTEXT) is None
    (tmp_path / "text.txt").write_text("")
    assert held_out_text(checkpoint, named, CONTEXT) is None
    unknown = replace(scores, data=replace(scores.data, held_out=None))
    assert held_out_text(checkpoint, unknown, CONTEXT) is None  # the model's own text, or a score file of others


def test_an_export_is_compared_with_the_dense_model_by_default(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    plan = acip_export.plan(model, scores, budget="1MB", format="gguf", scope="file", context=64, types=["q8_0"])
    report = acip_export.export(plan, tmp_path / "e", model=model, scores=scores)
    assert report is not None and report.passed
    divergence = report.runtimes[0].divergence
    assert report.text is not None and report.text.source.endswith("held out from the ranking")
    assert divergence is not None and 0 < divergence.mean_kl < min(0.05, divergence.kl_999)
    again = acip_export.verify(tmp_path / "e", model=model, scores=scores)
    assert again.text == report.text and again.runtimes[0].divergence == divergence
