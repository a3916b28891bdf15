"""Every family through all stages: ranked, planned, materialized, converted, verified in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from acip_export import api as pipeline
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.ranking import DataConfig, rank_model
from tests.gguf.test_families import CASES, family_model
from tests.gguf.tokenizers import training_text

FAMILIES = ["mistral", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"]


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_from_ranking_to_verified_export(case: str, tmp_path: Path) -> None:
    model = family_model(case, tmp_path, num_hidden_layers=2)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(training_text()[:60]), encoding="utf-8")
    scores = rank_model(model, text, algorithm="kfac", calibration=DataConfig(context=32))
    checkpoint = Checkpoint.open(model)
    assert set(scores.modules) == set(checkpoint.linear_modules)
    budget = int(0.45 * checkpoint.weight_bytes)
    for layout in ("stock", "lora"):
        request = PlanRequest("gguf", budget, budget_scope="file", layout=layout, context=64)
        plan = pipeline.plan_export(checkpoint, scores, request)
        report = pipeline.export_model(checkpoint, scores, plan, tmp_path / layout)
        assert report is not None
        assert report.passed
        assert report.written_bytes == plan.planned_bytes <= budget


def test_families_are_cases() -> None:
    assert set(FAMILIES) <= set(CASES)
