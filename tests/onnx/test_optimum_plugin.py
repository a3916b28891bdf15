"""``optimum-cli export acip`` is the main job under another name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import make_model, make_scores

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("models") / "tiny")
    make_scores(directory)
    return directory


def call(command: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = [str(Path(sys.executable).parent / command), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_writes_what_acip_export_writes(model: Path) -> None:
    asked = ("--budget", "3MB", "--format", "gguf", "--context", 64, "--no-verify", "--json")
    results: list[dict[str, Any]] = []
    for out, command in {"a": ("acip-export",), "b": ("optimum-cli", "export", "acip")}.items():
        done = call(*command, *asked, "-o", out, cwd=model)
        assert done.returncode == 0, done.stderr
        results.append({**json.loads(done.stdout), "out": None})
    assert results[0] == results[1]
    first, second = (
        {file.name: file.read_bytes() for file in (model / out).iterdir() if file.suffix == ".gguf"} for out in "ab"
    )
    assert first == second != {}


def test_errors_and_exit_codes_are_acip_exports(model: Path) -> None:
    done = call("optimum-cli", "export", "acip", "--budget", "3", "--format", "gguf", cwd=model)
    assert done.returncode == 2
    assert "no unit" in done.stderr
    assert call("optimum-cli", "export", "acip", "--nonsense", cwd=model).returncode == 2


def test_help_has_every_option(model: Path) -> None:
    shown = call("optimum-cli", "export", "acip", "--help", cwd=model).stdout
    for option in ("--budget", "--budget-scope", "--device", "--no-verify", "--dry-run", "-o OUT"):
        assert option in shown
