"""``--tune`` writes exports of the planned bytes that are nearer to the dense model, and can be verified again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import acip_export
from acip_export import api as pipeline
from acip_export.artifacts.names import TUNED_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.artifacts.tuned import load_tuned
from acip_export.errors import PlanFileError, TunedFileError, UsageError
from acip_export.model.checkpoint import Checkpoint
from tests.support import Run, make_model

ASKED = ("--budget", "1MB", "--budget-scope", "file", "--context", "64", "--no-calibrate")
# Budget and types: the last leaves no room for dense matrices alone.
PLANS = {"gguf": ("1MB", "q4_0"), "onnx": ("1MB", "int4"), "onnx with pairs": ("450kB", "int8")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=1)


@pytest.fixture(scope="module")
def ranked(model: Path, text: Path) -> ScoreFile:
    acip_export.rank(model, text, out=model / "m.acip", algorithm="fisher", context=32)
    return acip_export.load_scores(model / "m.acip")


def written(name: str, model: Path, ranked: ScoreFile, out: Path, tune: str | None) -> Path:
    budget, type = PLANS[name]
    plan = acip_export.plan(
        model, ranked, budget=budget, format=name.split()[0], scope="file", context=64, types=[type], calibrate=False,
        tune=tune,
    )  # fmt: skip
    assert ("pairs" in name) == any(decision.rank is not None for decision in plan.tensors)
    report = acip_export.export(plan, out, model=model, scores=ranked)
    assert report is not None
    assert report.passed
    assert report.written_bytes == report.planned_bytes
    return out


@pytest.fixture(scope="module", params=["gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PLANS][1:])])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def export(kind: str, model: Path, ranked: ScoreFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(kind, model, ranked, tmp_path_factory.mktemp("exports") / "tuned", "2s")


def test_it_is_nearer_than_without(kind: str, export: Path, model: Path, ranked: ScoreFile, tmp_path: Path) -> None:
    plan = load_plan(export / "plan.json")
    tuned = load_tuned(export, plan)
    assert tuned is not None
    assert tuned.result.after < tuned.result.before
    plain = written(kind, model, ranked, tmp_path / "plain", None)
    assert load_plan(plain / "plan.json").files == plan.files
    kl = [
        json.loads((each / "report.json").read_text())["runtimes"][0]["divergence"]["mean_kl"]
        for each in (plain, export)
    ]
    assert kl[1] < kl[0], "as the runtime itself measures it"


def test_it_is_verified_again(export: Path, model: Path, ranked: ScoreFile, tmp_path: Path) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    assert acip_export.verify(copy, model=model, scores=ranked).passed


def _removed(file: Path) -> None:
    file.unlink()


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _of_another_plan(file: Path) -> None:
    data = file.read_bytes()
    start = data.index(b'"plan_sha256":"') + len(b'"plan_sha256":"')
    file.write_bytes(data[:start] + b"0" * 64 + data[start + 64 :])


def _not_finite(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_removed, _truncated, _of_another_plan, _not_finite])
def test_damaged_numbers_are_an_error(
    damage: Callable[[Path], None], export: Path, model: Path, ranked: ScoreFile, tmp_path: Path
) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    damage(copy / TUNED_FILE)
    with pytest.raises(TunedFileError, match=r"export\s+again|damaged|truncated"):
        acip_export.verify(copy, model=model, scores=ranked)


@pytest.mark.usefixtures("ranked")
def test_what_cannot_be_tuned_is_refused_first(model: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = (*ASKED, "--format", "gguf", "--types", "q4_0", "-o", out)
    bundled = run("--model", model, *asked, "--tune", "2s", "--keep-bundle")
    assert bundled.code == 2
    assert "--tune" in bundled.err
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    text = model.parent / "text.txt"
    gone = text.rename(model.parent / "gone.txt")
    try:
        lost = run("--model", elsewhere, *asked, "--tune", "2s")
    finally:
        gone.rename(text)
    assert lost.code == 2
    assert "--tune" in lost.err
    assert run("--model", model, *asked, "--tune", "soon").code == 2
    assert not out.exists()


def test_plans_with_pairs_say_what_tuning_moves(model: Path, ranked: ScoreFile) -> None:
    def notes(type: str, budget: str, tune: str | None) -> str:
        plan = acip_export.plan(
            model,
            ranked,
            budget=budget,
            format="onnx",
            scope="file",
            context=64,
            types=[type],
            calibrate=False,
            tune=tune,
        )
        return "\n".join(plan.notes)

    assert "--tune 10min  moves the plan's factor pairs (7)" in notes("int8", "450kB", None)
    assert "--tune" not in notes("int8", "450kB", "1min")
    assert "--tune" not in notes("int8", "2MB", None)


def test_plans_say_for_how_long(model: Path, ranked: ScoreFile, tmp_path: Path) -> None:
    plan = acip_export.plan(
        model, ranked, budget="1MB", format="gguf", scope="file", types=["q8_0"], calibrate=False, tune="3min"
    )
    assert plan.tune_seconds == 180
    file = tmp_path / "plan.json"
    acip_export.save_plan(plan, file)
    file.write_text(file.read_text().replace('"tune_seconds": 180.0', '"tune_seconds": -1.0'))
    with pytest.raises(PlanFileError):
        load_plan(file)
    with pytest.raises(UsageError, match="bundle"):
        pipeline.materialize_bundle(Checkpoint.open(model), ranked, plan, tmp_path / "bundle")
