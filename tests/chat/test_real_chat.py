"""A real chat model, exported in both formats, is asked a question; and what is printed to run it answers too."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from acip_export.artifacts.plan import load_plan
from acip_export.formats.registry import export_format
from samples import real
from tests.chat.conftest import export
from tests.support import Run, needs_real_model

# Asked before any test: others put the cache elsewhere for as long as they run.
REAL_MODEL = real.cached()
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def real_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("real")
    model = place / "model"
    model.mkdir()
    for file in REAL_MODEL.model.iterdir():
        (model / file.name).symlink_to(file)
    return export(model, request.param, place / request.param, context=256)


@pytest.mark.slow
@needs_real_model
def test_the_capital_of_france(real_export: Path, run: Run) -> None:
    shown = run("chat", real_export, "--prompt", QUESTION, "--max-tokens", 24, "--json")
    assert shown.code == 0, shown.err
    (answer,) = json.loads(shown.out)["answers"]
    assert "Paris" in answer["text"]
    plan = load_plan(real_export / "plan.json")
    written_as = export_format(plan.format)
    commands = written_as.run_commands(plan, real_export, written_as.chat_template(real_export))
    for command in commands:
        if command.program in ("llama-cpp-python", "onnxruntime-genai"):
            text = command.text
            if command.program == "llama-cpp-python":
                pytest.importorskip("llama_cpp")
                # It draws its tokens otherwise, and a small model then says anything.
                text = text.replace("max_tokens=256", "max_tokens=24, temperature=0")
                assert text != command.text
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(text, {})
            assert "Paris" in printed.getvalue(), command.program
