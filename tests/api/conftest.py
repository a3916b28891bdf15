"""A ranked sample model, and a working directory beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ranking.support import calibration_text
from tests.support import make_scores

SAMPLE = Path(__file__).parents[2] / "samples" / "llama"


@pytest.fixture(scope="module")
def ranked_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("sample") / "llama"
    shutil.copytree(SAMPLE, model)
    make_scores(model)
    return model


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    """Beside the module's model: a few thousand tokens to rank on."""
    return calibration_text(model.parent / "text.txt", repeats=20)


@pytest.fixture
def here(ranked_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with the model as ``model``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(ranked_sample)
    return tmp_path
