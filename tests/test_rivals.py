"""The comparison with other tools: what is measured again, what a row says, and that the pages show the figures."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import acip_export
from acip_export.api import write_imatrix
from acip_export.model.checkpoint import Checkpoint
from acip_export.verification.reference import pass_dense
from benchmarks.rivals import __main__ as benchmark
from benchmarks.rivals import measure, pages
from benchmarks.rivals.tools import rivals
from tests.support import make_scores, needs_factor_pairs

ROOT = Path(__file__).parent.parent
FIGURES = {"mean_kl": 0.05, "kl_999": 0.8, "same_top": 0.86, "perplexity": 27.1}
THEIRS = {"format": "gguf", "tool": "llama-quantize", "name": "Q4_K_M", "bytes": 105_500_000, **FIGURES}
OURS = {"format": "gguf", "tool": "acip-export", "name": pages.title(THEIRS), "bytes": 105_400_000, "commit": "a"}


def _arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"only": None, "theirs": False, "ours": False, "again": False} | given)


def _titles(rows: list[dict[str, Any]], **given: Any) -> list[str]:
    return [pages.title(row) for row, _ in benchmark.jobs({"rows": rows}, _arguments(**given))]


def test_what_has_a_row_is_not_measured_again() -> None:
    every = [f"{rival.format} {rival.tool} {rival.name}" for rival in rivals()]
    assert len(set(every)) == len(every)
    assert _titles([]) == every
    assert _titles([dict(THEIRS)], theirs=True) == [name for name in every if name != pages.title(THEIRS)]
    assert _titles([dict(THEIRS)], theirs=True, again=True, only="Q4_K_M$") == [pages.title(THEIRS)]


def test_ours_is_made_beside_every_row_and_again_from_other_code() -> None:
    ours = f"gguf acip-export {pages.title(THEIRS)}"
    failed = {"format": "gguf", "tool": "AutoRound", "name": "Q4_0", "failed": "no"}
    assert _titles([dict(THEIRS), failed], only="Q4")[-1:] == [ours]
    assert _titles([dict(THEIRS), dict(OURS), failed], only="Q4_K_M$") == []
    assert _titles([dict(THEIRS), dict(OURS), failed], ours=True) == [ours]
    now = OURS | {"commit": benchmark.commit()}
    assert _titles([dict(THEIRS), now, failed], ours=True) == []


def test_a_tool_that_fails_says_why() -> None:
    program = "import sys; print('busy'); sys.exit('no such device\\n')"
    with pytest.raises(RuntimeError, match=r"^ended with 1: no such device$"):
        benchmark.watched([sys.executable, "-c", program], hours=1)
    with pytest.raises(RuntimeError, match="not done after 1e-05 hours"):
        benchmark.watched([sys.executable, "-c", "import time; time.sleep(60)"], hours=1e-5)


def test_the_peak_of_a_tool_is_its_own() -> None:
    """And not that of this process before it became the tool."""
    held = np.ones(400_000_000, np.uint8)
    program = "import time; held = bytearray(b'x') * 50_000_000; time.sleep(1)"
    spent = benchmark.watched([sys.executable, "-c", program], hours=1)
    assert held.nbytes > 3 * spent["peak_bytes"] > 150_000_000


def test_the_table_has_ours_beside_theirs() -> None:
    rows = [THEIRS, OURS | FIGURES | {"mean_kl": 0.01}, {"format": "gguf", "tool": "A", "name": "x", "failed": "a | b"}]
    table = pages.tables({"rows": rows}, "gguf")
    assert "| llama-quantize Q4_K_M | 105.5 | 0.0500 | 0.0100 | 0.20 | 0.80 | 0.80 | 86.0% | 86.0% |" in table
    assert "| A x | a / b |" in table
    assert "Q4_K_M" not in pages.tables({"rows": rows}, "onnx")
    assert "| llama-quantize Q4_K_M | 105.5 | 0.0500 | **0.0100** | 5.0 times less |" in pages.summary({"rows": rows})


def test_the_page_shows_the_figures_that_were_measured() -> None:
    document = json.loads((ROOT / "benchmarks" / "rivals.json").read_text(encoding="utf-8"))
    text = (ROOT / pages.PAGE).read_text(encoding="utf-8")
    assert text == pages.page(text, document), "run  python -m benchmarks.rivals --draw"
    assert pages.summary(document) in (ROOT / "README.md").read_text(encoding="utf-8"), "the same"


@pytest.mark.slow
@needs_factor_pairs
def test_a_preset_is_written_and_measured(tmp_path: Path) -> None:
    """Of the sample model, in processes of their own; float weights are the dense model, two bits are not."""
    model, windows = tmp_path / "model", np.arange(2 * 96).reshape(2, 96) % 500 + 5
    shutil.copytree(ROOT / "samples" / "llama", model)
    scores = make_scores(model)
    plan = acip_export.plan(model, scores, budget="100MB", scope="file", format="gguf", types=("bf16",), context=96)
    acip_export.export(plan, tmp_path / "source", model=model, scores=scores, verify=False)
    dense = np.stack(list(pass_dense(model, list(windows)).logits()))
    exact = measure.measure("gguf", tmp_path / "source", windows, dense)
    assert exact["mean_kl"] < 1e-3
    assert exact["perplexity"] == pytest.approx(exact["dense_perplexity"], rel=0.01)
    assert exact["memory_bytes"] > 0
    (tmp_path / "preset").mkdir()
    imatrix = tmp_path / "imatrix.gguf"
    write_imatrix(Checkpoint.open(model), scores, imatrix)
    words = ("preset", tmp_path / "source" / "model.gguf", tmp_path / "preset" / "model.gguf", imatrix, "Q2_K")
    subprocess.run([sys.executable, "-m", "benchmarks.llama_steps", *map(str, words)], cwd=ROOT, check=True)
    rounded = measure.measure("gguf", tmp_path / "preset", windows, dense)
    assert rounded["mean_kl"] > 0.01
    assert (tmp_path / "preset" / "model.gguf").stat().st_size < (tmp_path / "source" / "model.gguf").stat().st_size / 2
    budget = (tmp_path / "preset" / "model.gguf").stat().st_size
    words = (model, scores.file, "gguf", budget, 96, tmp_path / "ours")
    subprocess.run([sys.executable, "-m", "benchmarks.rivals.ours", *map(str, words)], cwd=ROOT, check=True)
    assert 0.8 * budget < (tmp_path / "ours" / "model.gguf").stat().st_size <= budget
