"""A ranked model as a user would have it: in the working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from acip_export import api as pipeline
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from tests.support import Shared, make_model, make_scores


@pytest.fixture(scope="session")
def ranked(shared: Shared) -> Path:
    def make(directory: Path) -> None:
        model = make_model(directory / "tiny")
        scores = make_scores(model)
        for target in ("gguf", "onnx"):  # measured once, not in every copy; a plan from the cache needs no torch
            checkpoint = Checkpoint.open(model)
            pipeline.rounding_errors(checkpoint, scores, resolve(PlanRequest(target), checkpoint).space)

    return shared("tiny-with-rounding-errors", make) / "tiny"


@pytest.fixture
def model(ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy, which is also the working directory."""
    copy = tmp_path / "tiny"
    shutil.copytree(ranked, copy)
    monkeypatch.chdir(copy)
    return copy


def truncated_scores(model: Path) -> None:
    """Cut the end of the model's score file off."""
    file = next(model.glob("*.acip"))
    file.write_bytes(file.read_bytes()[:-100])
