"""The trained sample with a chat template, exported in both formats, once a session."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from acip_export.api import convert_bundle
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from tests.support import CHATML, dense, make_bundle, make_plan, unranked

SAMPLE = Path(__file__).parents[2] / "samples" / "llama"
CONTEXT = 128


def export(model: Path, format_name: str, out: Path, context: int = CONTEXT) -> Path:
    """Eight bits, by rule."""
    layout, type_ = {"gguf": ("stock", "q8_0"), "onnx": ("factored", "int8")}[format_name]
    plan = make_plan(model, format_name, layout, dense(type=type_), context=context)
    files = export_format(format_name).predict_files(Checkpoint.open(model), layout, plan.tensors, plan.serving)
    plan = dataclasses.replace(plan, files=files, planned_bytes=sum(files.values()))
    bundle = make_bundle(model, plan, out.with_suffix(".bundle"), unranked(Checkpoint.open(model)))
    convert_bundle(bundle.path, out)
    return out


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``gguf``, ``onnx``: exports that chat. ``plain``: one without a template. ``model``: what they are made of."""
    root = tmp_path_factory.mktemp("chat")
    model = Path(shutil.copytree(SAMPLE, root / "llama"))
    plain = export(model, "gguf", root / "plain")
    (model / "chat_template.jinja").write_text(CHATML)
    made = {format_name: export(model, format_name, root / format_name) for format_name in ("gguf", "onnx")}
    return {**made, "plain": plain, "model": model}
