"""Rows that make up for each other's errors: whose they are, that it pays, and that everybody rounds alike."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from acip_export import api as pipeline
from acip_export.artifacts import bundle as bundles
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.names import FEEDBACK_FILE, MANIFEST_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import BundleError, ScoreFileError, UnsupportedError
from acip_export.formats.registry import export_format
from acip_export.io.scratch import Scratch
from acip_export.lowrank import feedback_cache
from acip_export.lowrank.moments import PackedMoment, pack_moment
from acip_export.materialization.factors import Norm
from acip_export.materialization.feedback_factors import FeedbackFactors
from acip_export.materialization.planned_model import PlannedModel
from acip_export.model.checkpoint import Checkpoint
from acip_export.rounding import error_feedback
from acip_export.rounding.error_feedback import FeedbackFactor
from converters.gguf.types import FEEDBACK_TYPES
from tests.gguf.test_feedback import moments_of
from tests.materialization.moments import correlated, scores_with_moments
from tests.support import dense, everywhere, make_model, make_plan

TYPES = {"gguf": "q4_0", "onnx": "int4"}
TALL = ("gate_proj", "up_proj")
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def scores(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreFile:
    return scores_with_moments(model, tmp_path_factory.mktemp("scores") / "m.acip", gradients=True)


def planned(model: Path, kind: str, **fields: object) -> Plan:
    form = TYPES[kind]
    rule = everywhere(embedding_type=form, **fields) if fields else dense(type=form, embedding_type=form)
    return replace(
        make_plan(model, kind, "factored" if fields or kind == "onnx" else "stock", rule), rounding="feedback"
    )


def opened(model: Path, scores: ScoreFile, plan: Plan) -> PlannedModel:
    form = export_format(plan.format)
    return PlannedModel(Checkpoint.open(model), scores, plan, form.round_trip, feedback_types=form.feedback_types)


def written(model: Path, scores: ScoreFile, plan: Plan, place: Path) -> Bundle:
    pipeline.materialize_bundle(Checkpoint.open(model), scores, plan, place)
    return Bundle.open(place, verify_hash=True)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_whose_rows_make_up_for_each_other(model: Path, scores: ScoreFile, kind: str, tmp_path: Path) -> None:
    bundle, direct = (
        written(model, scores, planned(model, kind), tmp_path / "b"),
        opened(model, scores, planned(model, kind)),
    )
    expected = {f"{name}.weight" for name in scores.modules if not name.endswith(TALL)}
    assert bundle.manifest.row_feedback.keys() == expected
    for name in bundle.tensors:
        found, made = bundle.row_feedback(name), direct.row_feedback(name)
        assert (found is None, made is None) == ((name not in expected),) * 2
        for one, other in zip(found or (), made or (), strict=True):
            assert one.size == bundle.tensors[name].shape[0]
            assert all(np.array_equal(getattr(one, part), getattr(other, part)) for part in bundles.FEEDBACK_PARTS)
    pairs = planned(model, kind, representation="factored", rank=64, up_type=TYPES[kind], down_type=TYPES[kind])
    assert not opened(model, scores, pairs).numbers.rows
    assert not opened(model, scores, replace(planned(model, kind), rounding="nearest")).numbers.rows


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_exports_and_bundles_have_the_same_bytes(model: Path, scores: ScoreFile, kind: str, tmp_path: Path) -> None:
    """Rows of q and k have another order in a GGUF."""
    form, plan = export_format(kind), planned(model, kind)
    places = [tmp_path / name for name in ("direct", "bundle")]
    for place, source in zip(
        places, (opened(model, scores, plan), written(model, scores, plan, tmp_path / "b")), strict=True
    ):
        place.mkdir()
        form.convert(source, place, lambda _: None)
    direct, through = (
        {file.name: file.read_bytes() for file in place.rglob("*") if file.is_file()} for place in places
    )
    assert direct == through
    alone = replace(scores, modules={name: replace(m, gradient_key="") for name, m in scores.modules.items()})
    (tmp_path / "alone").mkdir()
    form.convert(opened(model, alone, plan), tmp_path / "alone", lambda _: None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "alone").rglob("*") if file.is_file()} != direct


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gguf", name) for name in sorted(FEEDBACK_TYPES)]
    + [("onnx", name) for name in ("int8", "int4", "int4-b64", "int2")],
)
def test_the_loss_falls(kind: str, name: str) -> None:
    inputs, outputs = correlated(256, 1), correlated(192, 2)
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    known = moments_of(inputs)
    rows = pack_moment(outputs).row_factors([192], "it")
    round_trip, norm = export_format(kind).round_trip, Norm(inputs, outputs)
    alone, both = (
        norm.loss(round_trip(weight, name, each) - weight) for each in (known, replace(known, row_feedback=rows))
    )
    assert both < 0.85 * alone


def test_many_rows_are_rounded_in_parts(
    model: Path, scores: ScoreFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is rounded as if it were the matrix, and has the moment of its rows."""
    monkeypatch.setattr(error_feedback, "ROWS_AT_ONCE", 48)
    plan, round_trip = planned(model, "gguf"), export_format("gguf").round_trip
    bundle, direct = written(model, scores, plan, tmp_path / "b"), opened(model, scores, plan)
    name = f"{DOWN}.weight"
    factors, weight, known = bundle.row_feedback(name), bundle.read(name), bundle.inputs(name)
    assert factors is not None and [factor.size for factor in factors] == [43, 43, 42]
    parts = [
        round_trip(some, "q4_0", replace(known, row_feedback=[factor]))
        for some, factor in zip(weight.split(43), factors, strict=True)
    ]
    whole = round_trip(weight, "q4_0", known)
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole, round_trip(direct.read(name), "q4_0", direct.inputs(name)))
    moment = scores.second_moments[scores.modules[DOWN].gradient_key]
    part = moment.unpacked(part=torch.arange(43, 86)) + float(moment.diagonal.mean()) * torch.eye(43)
    order = torch.from_numpy(factors[1].order).long()
    upper = torch.linalg.cholesky(torch.linalg.inv(part[order][:, order])).T
    ratios = (upper / upper.diagonal()[:, None]).triu(1)
    assert torch.allclose(
        torch.from_numpy(factors[1].rows(0, 43)).double(), ratios, atol=0.01 * float(ratios.abs().max())
    )


def test_damaged_factors_are_refused(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    bundle = written(model, scores, planned(model, "gguf"), tmp_path / "b")
    file, name = bundle.path / FEEDBACK_FILE, f"{QUERY}.weight"
    tensors, key = load_file(file), f"rows/{bundle.manifest.row_feedback[name]}/0"
    other = bundle.manifest.feedback[f"{DOWN}.weight"]
    mixed = {each: tensors[each.replace(key, other)] for each in tensors}
    for damaged, message in (
        (mixed, f"factor '{key}' is of 256 rows, {name} has 128"),
        ({each: value for each, value in tensors.items() if not each.startswith(key)}, "is damaged"),
        ({each: 0 * value for each, value in tensors.items()}, "is damaged"),
    ):
        save_file(damaged, file)
        with pytest.raises(BundleError, match=message):
            bundle.row_feedback(name)
    save_file(tensors, file)
    factor = bundle.row_feedback(name)
    with pytest.raises(UnsupportedError, match="error feedback for 128 outputs cannot round 64 rows"):
        export_format("gguf").round_trip(
            bundle.read(name)[:64], "q4_0", replace(bundle.inputs(name), row_feedback=factor)
        )


def test_moments_that_are_none_are_refused_by_name(model: Path, scores: ScoreFile) -> None:
    key = scores.modules[QUERY].gradient_key
    packed = scores.second_moments[key]
    huge = replace(packed, steps=np.full_like(packed.steps, np.finfo(np.float32).max))
    broken = replace(scores, second_moments={**scores.second_moments, key: huge})
    with pytest.raises(ScoreFileError, match=f"the second moment '{key}' overflows"):
        opened(model, broken, planned(model, "gguf")).row_feedback(f"{QUERY}.weight")


def test_strange_manifests_are_refused(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    """Only matrices of layers have row factors, and only beside one of their columns."""
    bundle = written(model, scores, planned(model, "gguf"), tmp_path / "b")
    file, key = bundle.path / MANIFEST_FILE, bundle.manifest.row_feedback[f"{QUERY}.weight"]
    whole = json.loads(file.read_text())
    for name in ("model.embed_tokens.weight", "model.layers.7.mlp.down_proj.weight", "model.norm.weight"):
        file.write_text(json.dumps({**whole, "row_feedback": {name: key}}))
        with pytest.raises(BundleError, match=f"{name} is no matrix of a layer with feedback"):
            Bundle.open(bundle.path)


def test_matrices_that_share_gradients_share_a_factor(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    output, own = f"{QUERY[:-6]}o_proj", scores.modules[QUERY].gradient_key
    modules = {**scores.modules, output: replace(scores.modules[output], gradient_key=own)}
    bundle = written(model, replace(scores, modules=modules), planned(model, "gguf"), tmp_path / "b")
    assert bundle.manifest.row_feedback[f"{output}.weight"] == bundle.manifest.row_feedback[f"{QUERY}.weight"] == own


def test_parts_are_made_once(scores: ScoreFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user's cache takes some of them, and where it takes none and they lie beside the export."""
    key, made = scores.modules[DOWN].gradient_key, list[int]()
    make = PackedMoment.row_factors

    def counted(self: PackedMoment, parts: list[int], name: str) -> list[FeedbackFactor]:
        made.append(1)
        return make(self, parts, name)

    monkeypatch.setattr(PackedMoment, "row_factors", counted)
    monkeypatch.setattr(feedback_cache, "feedback_directory", lambda: tmp_path / "feedback")
    monkeypatch.setattr(feedback_cache, "_LEFT_FREE", 0)
    monkeypatch.setattr(error_feedback, "ROWS_AT_ONCE", 48)
    for least in (1, 43, 1000):  # the parts have 43, 43 and 42 rows
        monkeypatch.setattr(feedback_cache, "LEAST_COLUMNS", least)
        (tmp_path / str(least)).mkdir()
        shutil.rmtree(tmp_path / "feedback", ignore_errors=True)
        store = Scratch(tmp_path / str(least))
        first, second = (FeedbackFactors(scores, store).of_rows(key) for _ in range(2))
        assert made == [1]
        made.clear()
        for one, other in zip(first, second, strict=True):
            assert all(np.array_equal(getattr(one, part), getattr(other, part)) for part in bundles.FEEDBACK_PARTS)


@pytest.mark.parametrize(
    ("rows", "parts"), [(1, [1]), (2048, [2048]), (2304, [1152, 1152]), (5000, [1667, 1667, 1666])]
)
def test_parts_are_of_about_one_size(rows: int, parts: list[int]) -> None:
    assert error_feedback.row_parts(rows) == parts
