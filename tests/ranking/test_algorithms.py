"""A way to rank is one file: found, offered by the command line, documented, and named in the score file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from acip_export.artifacts.scores import load_scores
from acip_export.ranking.algorithms import algorithms, find_algorithm
from acip_export.ranking.config import Basis, Predictor

ROOT = Path(__file__).parents[2]
# A whole algorithm: components by their place in the basis, the same in every layer.
ONE_FILE = """
import numpy as np
from acip_export.ranking.algorithm import Algorithm, Ranking

def score(context, factorized):
    scores = {name: np.arange(len(s), 0, -1, dtype=np.float32) for name, s in factorized.singular.items()}
    return Ranking(scores, factorized.drop_losses, {"windows": len(context.windows)})

ALGORITHM = Algorithm("by-place", "The place of a component in its layer.", "input", score)
"""
# As if the file lay in the folder of the others.
WITH_FILE = """
import sys
from acip_export.ranking import algorithms
algorithms.__path__.append(sys.argv.pop(1))
from acip_export.cli.main import main
main()
"""


@pytest.mark.slow
def test_one_file_is_enough(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "by_place.py").write_text(ONE_FILE)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITH_FILE, tmp_path, "rank", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False, env=environment
        )

    help_text = " ".join(run("--help").stdout.split())  # it is drawn in columns
    assert re.search(r"without training: [a-z, -]*\bby-place\b", help_text), help_text
    out = tmp_path / "scores.acip"
    done = run(model, "--data", text, "--context", 32, "--algorithm", "by-place", "-o", out, "--no-measure-rounding")
    assert done.returncode == 0, done.stderr
    scores = load_scores(out)
    assert scores.algorithm["name"] == "by-place" and scores.basis == "input" and scores.algorithm["windows"] > 1
    for module in scores.modules.values():
        np.testing.assert_array_equal(module.scores, np.arange(len(module.scores), 0, -1))
        assert (module.drop_loss > 0).all() and module.adapter_a is None
    refused = run(model, "--data", text, "--algorithm", "by-place", "--basis", "svd", "--force")
    assert refused.returncode == 2 and "--basis is a setting of acip; --algorithm by-place has none" in refused.stderr


def test_documentation_has_the_table_of_the_registry() -> None:
    page = (ROOT / "docs" / "ranking.md").read_text(encoding="utf-8")
    table = page.partition("## Algorithms\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert table == [f"| `{a.name}` | `{a.basis}` | {a.summary} | {a.source} |" for a in algorithms().values()]


def test_nothing_else_knows_an_algorithm_by_name() -> None:
    names = set(algorithms()) - {*get_args(Basis), *get_args(Predictor)}
    assert names >= {"acip", "magnitude", "energy", "first-order"}
    for file in (ROOT / "acip_export").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not words & names, f"{file}:{node.lineno}"


def test_names_are_unique_and_summaries_are_sentences() -> None:
    known = algorithms()
    assert list(known) == sorted(known)  # the order of the files, which are called as they are
    for algorithm in known.values():
        assert re.fullmatch(r"[A-Z][^|\n]*\.", algorithm.summary)
        assert find_algorithm(algorithm.name) is algorithm


def test_the_registry_needs_no_torch() -> None:
    code = (
        "import sys; from acip_export.ranking.algorithms import algorithms; algorithms(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
