"""A file format that another package adds: installed beside ours, planned for, written, verified, told about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from acip_export.installed import FORMAT_GROUP
from tests.support import make_model, make_scores

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "tinyformat"
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """Run ``acip-export`` where the package is installed as pip installs it, metadata included."""
    place = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    source = tmp_path_factory.mktemp("source") / "tinyformat"
    # Built from a copy: nothing is left in the checkout.
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", place, source], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(place)]), "COLUMNS": "120"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "acip_export", *map(str, arguments)]
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model(tmp_path_factory.mktemp("third") / "m", num_hidden_layers=2)
    make_scores(path)
    return path


def test_nothing_of_ours_knows_its_name() -> None:
    ours = [*(ROOT / "acip_export").rglob("*.py"), *(ROOT / "converters").rglob("*.py"), ROOT / "pyproject.toml"]
    assert not [file for file in ours if "tiny" in file.read_text(encoding="utf-8").lower().split('"')]
    assert FORMAT_GROUP in (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")


def test_it_is_listed_with_its_options(cli: Cli) -> None:
    done = cli("formats", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert list(listed) == ["gguf", "onnx", "tiny"]
    assert listed["tiny"]["types"][-1] == {"name": "row8", "bits_per_weight": 8.0, "block": 32, "refused": None}
    assert "--tiny-comment" in listed["tiny"]["options"]
    assert "tiny: a line of text" in cli("--help").stdout


def test_one_that_cannot_be_loaded_breaks_nothing_else(tmp_path: Path) -> None:
    """Its package is told about, once, and everything else works."""
    installed = tmp_path / "broken-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{FORMAT_GROUP}]\nshattered = nowhere.at.all:FORMAT\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "COLUMNS": "200"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "acip_export", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    told = "the format 'shattered' of the package broken cannot be loaded"
    listed = run("formats", "--json")
    assert (listed.returncode, list(json.loads(listed.stdout))) == (0, ["gguf", "onnx"])
    assert listed.stderr.count(told) == 1
    asked = run("formats", "shattered")
    assert asked.returncode == 5
    assert f"error: {told}" in asked.stderr


@pytest.mark.slow
def test_a_model_is_planned_converted_and_verified(cli: Cli, model: Path, tmp_path: Path) -> None:
    ask = ("--model", model, "--format", "tiny", "--budget", "1600kB", "--budget-scope", "file", "--context", 64)
    done = cli(*ask, "--tiny-comment", "  from a friend ", "-o", tmp_path / "export", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(done.stdout)
    assert made["plan"]["options"] == {"tiny_comment": "from a friend"}
    report = made["report"]
    assert report["passed"] and report["written_bytes"] == made["plan"]["planned_bytes"] <= 1_600_000
    assert report["structure"]["found"] == report["structure"]["tensors"] == len(made["plan"]["tensors"])
    (runtime,) = report["runtimes"]
    assert runtime["runtime"].startswith("pytorch") and runtime["agreement"]["mean_kl"] < 1e-3
    assert {tensor["type"] for tensor in made["plan"]["tensors"]} >= {"row8", "f32"}
    with safe_open(tmp_path / "export" / "weights.safetensors", "pt") as stored:
        assert stored.metadata() == {"comment": "from a friend"}
    assert "tiny-run" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")


def test_what_it_does_not_have_is_refused_in_its_name(cli: Cli, model: Path) -> None:
    ask = ("plan", "--model", model, "--format", "tiny", "--budget", "1MB")
    for flags, says in (
        (("--types", "q4_k"), "'q4_k' is no type of tiny, but of gguf: --format gguf tiny has: f32, f16, row8"),
        (("--types", "row9"), "tiny has no type 'row9' here; it has: f32, f16, row8; did you mean row8?"),
        (("--layout", "stock"), "tiny has no layout 'stock'; it has: dense"),
        (("--backend", "webgpu"), "tiny has no backend 'webgpu'; it has: cpu"),
        (("--imatrix", "x.gguf"), "tiny exports have no --imatrix"),
    ):
        done = cli(*ask, *flags)
        assert done.returncode == 5 and says in " ".join(done.stderr.split()), done.stderr
    done = cli("plan", "--model", model, "--format", "gguf", "--budget", "1MB", "--tiny-comment", "x")
    assert done.returncode == 5 and "gguf exports have no --tiny-comment" in done.stderr


def test_without_the_package_its_plan_is_refused(cli: Cli, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    planned = cli(
        "plan", "--model", model, "--format", "tiny", "--budget", "1600kB", "--budget-scope", "file", "-o", file
    )
    assert planned.returncode == 0, planned.stderr
    clean = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "acip_export", "materialize", file, "--model", model, "-o", tmp_path / "bundle"]
    done = subprocess.run(list(map(str, command)), env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "unknown format 'tiny'; known: gguf, onnx" in done.stderr
