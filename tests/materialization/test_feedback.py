"""Error feedback from the score file to the export: what the bundle carries, and that everybody rounds alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from acip_export import api as pipeline
from acip_export.api.rounding_errors import rounding_errors, settle_rounding
from acip_export.artifacts.bundle import Bundle, load_bundle
from acip_export.artifacts.names import FEEDBACK_FILE, PLAN_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.rounding_errors import cache_file
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import BundleError, ScoreFileError, UsageError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from acip_export.rounding.kept_roundings import KeptRoundings
from acip_export.rounding.quantizer import InputMoments
from acip_export.verification.reference import open_reference
from converters.gguf import ggml_library as ggml
from tests.materialization.moments import scores_with_moments
from tests.support import dense, everywhere, make_model, make_plan, make_scores

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
EMBEDDING = "model.embed_tokens.weight"


def key_of(scores: ScoreFile, module: str) -> str:
    """What the bundle calls the input of a whole matrix: its channels are scaled."""
    return f"{scores.modules[module].input_key}, scaled"


def planned(model: Path, rounding: str = "feedback", **fields: object) -> Plan:
    rule = dense(type="q4_0", embedding_type="f16") if not fields else everywhere(embedding_type="f16", **fields)
    layout = "factored" if fields else "stock"
    return replace(make_plan(model, "gguf", layout, rule), rounding=rounding)  # type: ignore[arg-type]


def written(model: Path, scores: ScoreFile, plan: Plan, directory: Path) -> tuple[Bundle, dict[str, np.ndarray]]:
    """A bundle, and the bytes of the tensors of its export."""
    pipeline.materialize_bundle(Checkpoint.open(model), scores, plan, directory / "bundle")
    pipeline.convert_bundle(directory / "bundle", directory / "export", check=False)
    reader = gguf.GGUFReader(directory / "export" / "model.gguf")
    tensors = {tensor.name: np.array(tensor.data).view(np.uint8).reshape(-1) for tensor in reader.tensors}
    return Bundle.open(directory / "bundle", verify_hash=True), tensors


def test_the_bundle_has_one_factor_for_every_input(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    bundle, _ = written(model, scores, planned(model), tmp_path)
    matrices = {f"{name}.weight": key_of(scores, name) for name in scores.modules}
    assert bundle.manifest.feedback == matrices
    with safe_open(bundle.path / FEEDBACK_FILE, framework="numpy") as file:
        keys = {name.rpartition("/")[0] for name in file.keys()}  # noqa: SIM118
    assert {key for key in keys if not key.startswith("rows/")} == set(matrices.values())
    factor = bundle.inputs(f"{QUERY}.weight").feedback
    assert factor is not None and factor.size == scores.modules[QUERY].shape[1]
    assert bundle.inputs("model.embed_tokens.weight").feedback is None


def test_the_reference_reads_what_the_export_was_rounded_to(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    """Queries and keys, too, whose rows a GGUF has in another order: they are put into it when they are rounded."""
    bundle, _ = written(model, scores, planned(model), tmp_path)
    kept = KeptRoundings(tmp_path / "kept")
    kept.directory.mkdir()
    (tmp_path / "again").mkdir()
    export_format("gguf").convert(Bundle.open(bundle.path, kept=kept), tmp_path / "again", lambda _: None)
    before = len(list(kept.directory.iterdir()))
    assert before == len(scores.modules)
    windows = [np.arange(20)]
    again = Bundle.open(bundle.path, kept=kept)
    (found,) = open_reference(again, export_format("gguf").round_trip).passed(windows).logits()
    (expected,) = open_reference(bundle, export_format("gguf").round_trip).passed(windows).logits()
    assert np.array_equal(found, expected)
    assert len(list(kept.directory.iterdir())) == before


def test_bundle_and_export_are_rounded_alike(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    bundle, tensors = written(model, scores, planned(model), tmp_path)
    reference = load_bundle(bundle.path, export_format("gguf").round_trip)
    weight = reference.get_parameter(f"{DOWN}.weight").detach().numpy()
    read = ggml.dequantize(tensors["blk.0.ffn_down.weight"], weight.shape, "q4_0")
    assert np.array_equal(read, weight)
    nearest = export_format("gguf").round_trip(
        bundle.read(f"{DOWN}.weight"), "q4_0", InputMoments(bundle.importance(f"{DOWN}.weight"))
    )
    assert not np.array_equal(read, nearest.numpy())


def test_nearest_has_no_factors_and_the_bytes_of_ggml(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    bundle, tensors = written(model, scores, planned(model, "nearest"), tmp_path)
    assert not (bundle.path / FEEDBACK_FILE).exists()
    assert (bundle.manifest.feedback, bundle.manifest.feedback_sha256) == ({}, None)
    moment = torch.from_numpy(scores.modules[DOWN].input_moment)
    expected = ggml.quantize(Checkpoint.open(model).read(f"{DOWN}.weight"), "q4_0", moment)
    assert np.array_equal(tensors["blk.0.ffn_down.weight"], expected)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_tied_embedding_is_rounded_with_feedback(tmp_path: Path, kind: str) -> None:
    """Under its own moment, in what is written and in what plans are made with."""
    model = make_model(tmp_path / "m", hidden_size=128, intermediate_size=128, head_dim=32, num_hidden_layers=1)
    scores = scores_with_moments(model, tmp_path / "m.acip")
    form = {"gguf": "q4_0", "onnx": "int4"}[kind]
    round_trip = export_format(kind).round_trip
    weight = Checkpoint.open(model).read(EMBEDDING).double()
    moment = scores.second_moments[EMBEDDING].unpacked()
    costs, errors = {}, {}
    for way in ("nearest", "feedback"):
        plan = replace(make_plan(model, kind, "stock", dense(type=form, embedding_type=form)), rounding=way)  # type: ignore[arg-type]
        pipeline.materialize_bundle(Checkpoint.open(model), scores, plan, tmp_path / way)
        bundle = Bundle.open(tmp_path / way)
        known = bundle.inputs(EMBEDDING)
        assert (known.feedback is None, known.importance is None) == ((way == "nearest"),) * 2
        change = load_bundle(bundle.path, round_trip).get_parameter(EMBEDDING).detach() - weight
        costs[way] = float(((change @ moment) * change).sum())
        space = resolve(PlanRequest(kind, types=(form,), rounding=way), Checkpoint.open(model)).space  # type: ignore[arg-type]
        errors[way] = rounding_errors(Checkpoint.open(model), scores, space).dense[EMBEDDING][form]
    assert costs["feedback"] < 0.75 * costs["nearest"]
    assert 0.8 < errors["feedback"] / errors["nearest"] * costs["nearest"] / costs["feedback"] < 1.25


def test_types_that_do_not_know_feedback_need_no_factor(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    plan = replace(make_plan(model, "gguf", "stock", dense(type="f16")), rounding="feedback")
    bundle, _ = written(model, scores, plan, tmp_path)
    assert not (bundle.path / FEEDBACK_FILE).exists()


def test_the_same_bundle_twice(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    first, one = written(model, scores, planned(model), tmp_path / "a")
    second, two = written(model, scores, planned(model), tmp_path / "b")
    assert first.manifest == second.manifest
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_first_factors_of_pairs_are_rounded_with_feedback(model: Path, tmp_path: Path) -> None:
    """Beside the pair in floats: what the rank cost is no matter here."""
    scores = scores_with_moments(model, tmp_path / "m.acip")
    fields = {"representation": "factored", "rank": 64}
    checkpoint = Checkpoint.open(model)
    plan = planned(model, **fields, up_type="q4_0", down_type="q4_0")
    exact = planned(model, **fields, up_type="f32", down_type="f32")
    products = {}
    for way, each in (("b", plan), ("n", replace(plan, rounding="nearest")), ("f", exact)):
        pipeline.materialize_bundle(checkpoint, scores, each, tmp_path / way)
        module = load_bundle(tmp_path / way, export_format("gguf").round_trip).get_submodule(DOWN)
        up, down = (module.get_submodule(part).weight.detach().double() for part in ("up", "down"))
        products[way] = up @ down
    assert set(Bundle.open(tmp_path / "b").manifest.feedback) == {f"{name}.down.weight" for name in scores.modules}
    from acip_export.materialization.factors import Norm

    norm = Norm.of(scores.modules[DOWN], scores.second_moments, checkpoint.read(f"{DOWN}.weight").double())
    costs = {way: norm.loss(product - products["f"]) for way, product in products.items()}
    assert costs["b"] < 0.75 * costs["n"]


def test_damaged_factors_are_refused(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    bundle, _ = written(model, scores, planned(model), tmp_path)
    file = bundle.path / FEEDBACK_FILE
    tensors = load_file(file)
    own, other = key_of(scores, QUERY), key_of(scores, DOWN)
    mixed = {name: tensors[name.replace(own, other)] for name in tensors}
    for damaged, message in (
        (mixed, f"factor {own!r} is of"),
        ({name: value for name, value in tensors.items() if not name.endswith("order")}, "is damaged"),
        ({name: 0 * value for name, value in tensors.items()}, "name every place once"),
    ):
        save_file(damaged, file)
        with pytest.raises(BundleError, match=message):
            bundle.inputs(f"{QUERY}.weight")
        with pytest.raises(BundleError, match=f"{FEEDBACK_FILE} has changed"):
            Bundle.open(bundle.path, verify_hash=True)
    file.unlink()
    with pytest.raises(BundleError, match=f"has no {FEEDBACK_FILE}"):
        Bundle.open(bundle.path, verify_hash=True)
    with pytest.raises(BundleError, match="is damaged"):
        bundle.inputs(f"{QUERY}.weight")


def test_moments_that_are_none_are_refused_by_name(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    key = scores.modules[QUERY].input_key
    packed = scores.second_moments[key]
    huge = replace(packed, steps=np.full_like(packed.steps, np.finfo(np.float32).max))
    broken = replace(scores, second_moments={**scores.second_moments, key: huge})
    with pytest.raises(ScoreFileError, match=f"the second moment '{key}, scaled' overflows"):
        pipeline.materialize_bundle(Checkpoint.open(model), broken, planned(model), tmp_path / "b")
    with pytest.raises(ScoreFileError, match=r"needs second moments.*--rounding nearest"):
        pipeline.materialize_bundle(Checkpoint.open(model), make_scores(model), planned(model), tmp_path / "b")


def test_who_rounds_with_feedback(model: Path, scores: ScoreFile) -> None:
    asked = PlanRequest("gguf")
    assert settle_rounding(scores, asked) == (replace(asked, rounding="feedback"), ())
    assert settle_rounding(scores, replace(asked, rounding="nearest")) == (replace(asked, rounding="nearest"), ())
    settled, (note,) = settle_rounding(make_scores(model), asked)
    assert settled.rounding == "nearest" and "no second moments" in note
    settled, (note,) = settle_rounding(scores, replace(asked, options={"imatrix": "x"}))
    assert settled.rounding == "nearest" and "different texts" in note
    assert settle_rounding(scores, PlanRequest("onnx")) == (PlanRequest("onnx", rounding="feedback"), ())
    with pytest.raises(UsageError, match="no second moments"):
        settle_rounding(make_scores(model), replace(asked, rounding="feedback"))


def test_plans_are_made_with_the_errors_of_their_rounding(model: Path, scores: ScoreFile, tmp_path: Path) -> None:
    """And their exports are of the bytes that were planned."""
    checkpoint = Checkpoint.open(model)
    request = PlanRequest("gguf", Checkpoint.open(model).weight_bytes // 6, "file", types=("q8_0", "q4_0"), context=64)
    plans = {
        way: pipeline.plan_export(checkpoint, scores, replace(request, rounding=way))  # type: ignore[arg-type]
        for way in ("nearest", "feedback")
    }
    assert plans["feedback"].predicted_loss < plans["nearest"].predicted_loss
    assert {way: plan.rounding for way, plan in plans.items()} == {way: way for way in plans}
    assert pipeline.plan_export(checkpoint, scores, request) == plans["feedback"]
    assert scores.file is not None
    for way in plans:
        assert cache_file(scores.file, "gguf", way).is_file()  # type: ignore[arg-type]
    pipeline.export_model(checkpoint, scores, plans["feedback"], tmp_path / "export", verify=False)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "export").iterdir() if file.name != PLAN_FILE}
    assert sizes == plans["feedback"].files
