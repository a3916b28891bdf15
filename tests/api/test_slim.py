"""A slim score file: types are planned as with the whole one; what needs second moments is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from acip_export import api as pipeline
from acip_export.artifacts.scores import ScoreFile, load_scores, save_scores
from acip_export.errors import ScoreFileError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.ranking import rank_model
from acip_export.ranking.config import DataConfig
from tests.ranking.support import calibration_text
from tests.support import everywhere, make_plan, make_scores

MB = 10**6


@pytest.fixture(scope="module")
def slim(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreFile:
    file = tmp_path_factory.mktemp("scores") / "slim.acip"
    save_scores(make_scores(model).without_moments(), file)
    return load_scores(file)


@pytest.mark.slow
def test_ranking_leaves_the_moments_out(model: Path, tmp_path: Path) -> None:
    text = calibration_text(tmp_path / "text.txt")
    few = DataConfig(context=32, batch=8, statistics_tokens=1024)
    whole, slim = (
        rank_model(model, text, algorithm="kfac", calibration=few, out=tmp_path / f"{kind}.acip", slim=kind == "slim")
        for kind in ("whole", "slim")
    )
    kept = load_scores(tmp_path / "slim.acip")
    assert kept.slim and not kept.second_moments and whole.second_moments
    assert all(np.array_equal(kept.modules[name].drop_loss, module.drop_loss) for name, module in whole.modules.items())
    assert (tmp_path / "slim.acip").stat().st_size < 0.2 * (tmp_path / "whole.acip").stat().st_size
    assert slim.whole_again == f"acip-export rank . --data {text} --algorithm kfac --force"
    again = load_scores(tmp_path / "whole.acip")
    assert all(
        np.array_equal(again.modules[name].up_sensitivity, module.up_sensitivity)
        for name, module in whole.modules.items()
    )  # what is returned is what was written


@pytest.mark.parametrize(("kind", "layout"), [("gguf", "stock"), ("onnx", "factored")])
def test_types_are_planned(kind: str, layout: str, model: Path, slim: ScoreFile) -> None:
    # Of GGUF's two dozen types a few, which are quick to measure.
    types = ("q8_0", "q6_k", "q4_k", "q2_k") if kind == "gguf" else ()
    request = PlanRequest(kind, 4 * MB, "file", context=32, types=types)
    plan = pipeline.plan_export(Checkpoint.open(model), slim, request)
    assert plan.layout == layout and plan.rounding == "nearest"
    assert all(decision.rank is None for decision in plan.tensors)
    assert any("no second moments" in note and "acip-export rank . --data none" in note for note in plan.notes)
    assert any("no factor pairs: the score file is slim" in note for note in plan.notes) == (kind == "onnx")
    if kind == "gguf":
        whole = pipeline.plan_export(Checkpoint.open(model), make_scores(model), replace(request, rounding="nearest"))
        assert whole.tensors == plan.tensors and whole.predicted_loss == plan.predicted_loss


def test_what_needs_moments_is_refused(model: Path, slim: ScoreFile, tmp_path: Path) -> None:
    checkpoint, request = Checkpoint.open(model), PlanRequest("gguf", 4 * MB, "file", context=32)
    with pytest.raises(UsageError, match=r"(?s)layout lora is made of factor pairs.*acip-export rank .*--layout stock"):
        pipeline.plan_export(checkpoint, slim, replace(request, layout="lora"))
    with pytest.raises(UsageError, match=r"--rounding feedback is not possible.*acip-export rank "):
        pipeline.plan_export(checkpoint, slim, replace(request, rounding="feedback"))
    pairs = make_plan(
        model, "onnx", "factored", everywhere(representation="factored", rank=32, up_type="int8", down_type="int8")
    )
    with pytest.raises(ScoreFileError, match=r"(?s)is to be factored, and the score file is slim.*acip-export rank "):
        pipeline.materialize_bundle(checkpoint, slim, pairs, tmp_path / "b")
