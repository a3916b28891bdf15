"""One model with a score file, and two measured exports of it: real planner, converter and runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from acip_export import api as pipeline
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from tests.support import CORPUS, make_model, make_scores

CONTEXT = 64
BUDGETS = (950_000, 1_150_000)
TYPES = ("int8", "int4")


@dataclass(frozen=True)
class Exports:
    """``directories``: of a smaller and a larger export, both with reports; ``sizes``: as planned for the slider."""

    checkpoint: Checkpoint
    scores: ScoreFile
    directories: tuple[Path, Path]
    sizes: tuple[Plan, ...]


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    place = tmp_path_factory.mktemp("report")
    model = make_model(place / "tiny", hidden_size=128, intermediate_size=256, num_hidden_layers=3, head_dim=32)
    (model / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    scores = make_scores(model)
    checkpoint = Checkpoint.open(model)
    (place / "text.txt").write_text("".join(CORPUS) * 4, encoding="utf-8")
    windows = pipeline.evaluation_text(checkpoint.path, place / "text.txt", CONTEXT)
    sizes: tuple[Plan, ...] = ()
    for budget in BUDGETS:
        plan = pipeline.plan_export(checkpoint, scores, PlanRequest("onnx", budget, context=CONTEXT, types=TYPES))
        sizes = sizes or pipeline.planned_sizes(checkpoint, scores, plan, count=6)
        pipeline.export_model(checkpoint, scores, plan, place / str(budget), text=windows, sizes=sizes)
    return Exports(checkpoint, scores, (place / str(BUDGETS[0]), place / str(BUDGETS[1])), sizes)
