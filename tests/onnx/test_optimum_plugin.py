"""``optimum-cli export acip`` is the main job under another name."""

from __future__ import annotations

import argparse
import json
import os
import runpy
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


@pytest.mark.parametrize(
    ("asked", "added"),
    [
        ("--format onnx", "f32"),
        ("--format ONNX --backend webgpu", "f16"),
        ("--device browser", "f32"),
        ("--format onnx --cache-type int8", None),
        ("--format onnx --cache-type-k auto --cache-type-v auto", None),
        ("--format gguf", None),
        ("--format nonsense", None),
        ("--device nonsense", None),
        ("--no-verify", None),
    ],
)
def test_onnx_has_a_cache_that_optimum_makes(monkeypatch: pytest.MonkeyPatch, asked: str, added: str | None) -> None:
    """A type that is chosen for the budget may be one that optimum cannot make."""
    called: list[list[str]] = []
    monkeypatch.setattr("acip_export.cli.main.main", lambda: called.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["optimum-cli"])
    source = ROOT / "optimum" / "commands" / "register" / "register_acip.py"
    parser = argparse.ArgumentParser()
    command = runpy.run_path(str(source))["AcipExportCommand"]
    made = command(parser.add_subparsers())
    made.args = parser.parse_args(["acip", *asked.split()])
    made.run()
    assert called == [[*asked.split(), *(("--cache-type", added) if added else ())]]


def test_errors_and_exit_codes_are_acip_exports(model: Path) -> None:
    done = call("optimum-cli", "export", "acip", "--budget", "3", "--format", "gguf", cwd=model)
    assert done.returncode == 2
    assert "no unit" in done.stderr
    assert call("optimum-cli", "export", "acip", "--nonsense", cwd=model).returncode == 2


def test_help_has_every_option(model: Path) -> None:
    shown = call("optimum-cli", "export", "acip", "--help", cwd=model).stdout
    for option in ("--budget", "--budget-scope", "--device", "--no-verify", "--dry-run", "-o OUT"):
        assert option in shown
