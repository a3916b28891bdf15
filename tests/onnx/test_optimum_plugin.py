"""``optimum-cli export acip`` is the main job under another name."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from acip_export.artifacts.bundle import load_bundle
from acip_export.artifacts.cache_losses import CacheLosses, save_cache_losses
from acip_export.artifacts.plan import load_plan
from acip_export.errors import UnsupportedError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from converters.onnx.runtimes.genai import GenaiSession
from tests.onnx.consumers import optimum_onnx
from tests.support import make_model, make_scores

ROOT = Path(__file__).parents[2]
PLUGIN = Path("optimum", "commands", "register", "register_acip.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("models") / "tiny")
    make_scores(directory)
    return directory


def call(command: str, *arguments: object, cwd: Path, more: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment with this checkout on the path, and ``more`` behind it."""
    program = [str(Path(sys.executable).parent / command), *map(str, arguments)]
    path = os.pathsep.join(map(str, (ROOT, more) if more else (ROOT,)))
    environment = {**os.environ, "PYTHONPATH": path}
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
        ("--format onnx", ["--own-cache"]),
        ("--device browser --no-verify", ["--own-cache"]),
        ("--format onnx --cache-type int8", []),
        ("--format onnx --cache-type-k auto --cache-type-v auto", []),
    ],
)
def test_what_it_adds(monkeypatch: pytest.MonkeyPatch, asked: str, added: list[str]) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("acip_export.cli.main.main", lambda: called.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["optimum-cli"])
    parser = argparse.ArgumentParser()
    command = runpy.run_path(str(ROOT / PLUGIN))["AcipExportCommand"]
    made = command(parser.add_subparsers())
    made.args = parser.parse_args(["acip", *asked.split()])
    made.run()
    assert called == [[*asked.split(), *added]]


@pytest.mark.slow
def test_its_defaults_run_in_optimum(tmp_path: Path) -> None:
    """Where another cache would be chosen: optimum's tokens, files and cache as planned, and nothing else suggested."""
    model = Path(shutil.copytree(ROOT / "samples" / "llama", tmp_path / "llama"))
    scores = make_scores(model)
    # As if measured: int8 loses next to nothing, so that a plan takes it.
    zero = {"f32": 0.0, "int8": 2e-4, "int4": 2e-2}
    losses = CacheLosses("onnx", export_format("onnx").quantizer(), scores.sha256, keys=zero, values=zero)
    assert scores.file is not None
    save_cache_losses(losses, scores.file)

    budget = ("--budget", "6MB", "--format", "onnx", "--json")
    plain = call("acip-export", *budget, "--dry-run", cwd=model)
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout)["serving"]["cache_type_k"] == "int8"

    done = call("optimum-cli", "export", "acip", *budget, "--keep-bundle", "-o", "made", cwd=model)
    assert done.returncode == 0, done.stderr
    plan = load_plan(model / "made" / "plan.json")
    assert plan.serving.cache_types == "f32"
    suggested = [each.change for each in plan.certificate.alternatives]
    assert suggested and not any("cache" in text for text in (*suggested, *plan.notes))
    assert {name: (model / "made" / name).stat().st_size for name in plan.files} == plan.files
    assert plan.used_bytes <= 6_000_000

    text = (ROOT / "samples" / "text" / "evaluation.txt").read_text()[:600]
    prompt = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:100]
    context = plan.serving.context
    request = {"texts": [text], "prompt": prompt, "count": context - len(prompt)}
    (answer,) = optimum_onnx("optimum_onnx.py", [model / "made"], request)
    # Of every token but the last, which no other follows.
    assert answer["cache_bytes"] * context == plan.breakdown["kv_cache"] * (context - 1)
    with GenaiSession(model / "made", plan.serving) as genai:
        assert answer["tokens"] == genai.greedy(prompt, request["count"])
    assert len(set(answer["tokens"])) > 2  # a constant answer would agree with everything
    with torch.no_grad():
        logits = load_bundle(model / "made-bundle")(torch.tensor([[*prompt, *answer["tokens"]]])).logits[0]
    # The runtime rounds activations to eight bits, so that near ties may fall the other way.
    expected = logits[len(prompt) - 1 : -1].argmax(1)
    assert (expected == torch.tensor(answer["tokens"])).float().mean() > 0.97


@pytest.mark.slow
def test_a_second_copy_on_the_path_is_no_second_command(model: Path, tmp_path: Path) -> None:
    """A checkout on the path of an environment that has it installed, too."""
    place = tmp_path / PLUGIN
    place.parent.mkdir(parents=True)
    shutil.copy(ROOT / PLUGIN, place)
    done = call("optimum-cli", "export", "acip", "--help", cwd=model, more=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_cache_of_its_own_is_all_that_is_suggested(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    for backend, own in (("cpu", "f32"), ("webgpu", "f16")):
        asked = PlanRequest("onnx", 10**7, backend=backend, own_cache=True)
        assert resolve(asked, checkpoint).caches == ((own, own),)
        assert list(resolve(asked, checkpoint).space.format.cache_types) == [own]
    with pytest.raises(UnsupportedError, match="makes its cache in f32"):
        resolve(PlanRequest("onnx", 10**7, own_cache=True, cache_type="int8"), checkpoint)
    # Where the program is given the cache's type, any may be chosen.
    assert len(resolve(PlanRequest("gguf", 10**7, own_cache=True, cache_type="auto"), checkpoint).caches) > 1


def test_errors_and_exit_codes_are_acip_exports(model: Path) -> None:
    done = call("optimum-cli", "export", "acip", "--budget", "3", "--format", "gguf", cwd=model)
    assert done.returncode == 2
    assert "no unit" in done.stderr
    assert call("optimum-cli", "export", "acip", "--nonsense", cwd=model).returncode == 2


def test_help_has_every_option(model: Path) -> None:
    shown = call("optimum-cli", "export", "acip", "--help", cwd=model).stdout
    for option in ("--budget", "--budget-scope", "--device", "--no-verify", "--dry-run", "-o OUT"):
        assert option in shown
