"""The notebook runs: cell by cell, as one program in a process and a directory of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "samples" / "notebook.ipynb"


def _code() -> list[str]:
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs() -> None:
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(cell.get("outputs", []) == [] for cell in document["cells"])
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    script = tmp_path / "cells.py"
    script.write_text("\n".join(_code()), encoding="utf-8")
    places = {
        "ACIP_NOTEBOOK_MODEL": str(ROOT / "samples" / "llama"),
        "ACIP_NOTEBOOK_TEXT": str(ROOT / "samples" / "text" / "calibration.txt"),
        "ACIP_NOTEBOOK_OUT": str(tmp_path / "out"),
    }
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "bytes planned" in done.stdout and "as planned: True" in done.stdout
    assert (tmp_path / "out" / "gguf" / "model.gguf").is_file()
