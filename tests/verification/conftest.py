"""A tiny ranked model and one export of it in each format, made as users make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from acip_export.api import convert_bundle, open_scores, plan_export
from acip_export.artifacts.plan import Plan
from acip_export.materialization import materialize_bundle
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from tests.support import CORPUS, make_model, make_scores

CONTEXT = 64


@dataclass(frozen=True)
class Made:
    """Directories."""

    model: Path
    bundle: Path
    export: Path
    plan: Plan


MakeExport = Callable[[str], Made]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    """``exported(target)``: made once a session; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("verify")
    model = make_model(root / "tiny")
    make_scores(model)
    made: dict[str, Made] = {}

    def make(target: str) -> Made:
        if target not in made:
            checkpoint = Checkpoint.open(model)
            scores = open_scores(checkpoint, None)
            # Eight-bit types only: roundings that are small beside what the random model says.
            types = {"gguf": ("q8_0", "f16"), "onnx": ("int8", "f32")}[target]
            plan = plan_export(checkpoint, scores, PlanRequest(target, 3_000_000, types=types, context=CONTEXT))
            materialize_bundle(checkpoint, scores, plan, root / f"{target}-bundle")
            convert_bundle(root / f"{target}-bundle", root / target)
            made[target] = Made(model, root / f"{target}-bundle", root / target, plan)
        return made[target]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(CORPUS) * 6, encoding="utf-8")
    return file


def transpose_onnx(export: Path, name: str) -> None:
    """Exchange the dimensions of a matrix of an ONNX graph that has ``name`` in its own."""
    import onnx

    file = export / "onnx" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if name in each.name and len(each.dims) > 1)
    tensor.dims[0], tensor.dims[1] = tensor.dims[1], tensor.dims[0]
    file.write_bytes(model.SerializeToString())


def rename_gguf(export: Path) -> None:
    """Give a tensor of a GGUF file another name of the same length."""
    file = export / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_X.weight"))
