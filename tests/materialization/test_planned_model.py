"""Exports made straight from checkpoint and plan: the bytes of those by way of a bundle, and no copy in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acip_export import api as pipeline
from acip_export.api.export import planned_model
from acip_export.api.rounding_errors import rounding_errors
from acip_export.artifacts.bundle import Bundle
from acip_export.artifacts.plan import Plan, plan_sha256
from acip_export.artifacts.scores import ScoreFile
from acip_export.formats.registry import export_format
from acip_export.io import kept_until_done
from acip_export.io.scratch import Scratch
from acip_export.lowrank import feedback_cache
from acip_export.lowrank.moments import PackedMoment
from acip_export.materialization.feedback_factors import FeedbackFactors
from acip_export.materialization.plan_numbers import PlanNumbers
from acip_export.measurement.rounding_errors import _Inputs
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from acip_export.progress import Progress
from acip_export.rounding.kept_roundings import KeptRoundings
from tests.encoders import make_encoder
from tests.materialization.moments import scores_with_moments
from tests.support import dense, everywhere, make_model, make_plan, make_scores

PAIRS = {"representation": "factored", "rank": 64}
Decide = Callable[[str, tuple[int, ...]], dict[str, Any]]


def with_files(plan: Plan, model: Path, **changes: Any) -> Plan:
    """The plan with the files that it is to have."""
    plan = replace(plan, **changes)
    checkpoint = Checkpoint.open(model).with_options(plan.options)
    files = export_format(plan.format).predict_files(checkpoint, plan.layout, plan.tensors, plan.serving)
    return replace(plan, files=files, planned_bytes=sum(files.values()), budget_scope="file")


def mixed(types: tuple[str, str], **fields: Any) -> Decide:
    """Pairs in the MLP, everything else dense."""

    def decide(name: str, _shape: tuple[int, ...]) -> dict[str, Any]:
        if "mlp" in name:
            return {**PAIRS, "up_type": types[0], "down_type": types[1], **fields}
        return {"representation": "dense", "type": types[1]}

    return decide


CASES: dict[str, tuple[str, str, Decide, dict[str, Any]]] = {
    "gguf, scaled": ("gguf", "stock", dense(type="q4_0"), {"rounding": "feedback"}),
    "gguf, pairs": ("gguf", "factored", mixed(("q4_0", "q8_0")), {"rounding": "feedback"}),
    "gguf, LoRA": ("gguf", "lora", mixed(("f16", "f16"), representation="lora", type="q4_0"), {}),
    "gguf, base and pair": ("gguf", "lora", mixed(("q8_0", "q8_0"), representation="residual", type="q4_0"), {}),
    "onnx, scaled": ("onnx", "factored", dense(type="int4-b64"), {"rounding": "feedback"}),
    "onnx, pairs": ("onnx", "factored", mixed(("int4-b64", "int8")), {}),
    "onnx, floats": ("onnx", "factored", everywhere(**PAIRS, up_type="f32", down_type="f32"), {"adapters": True}),
}


def directly(model: Path, scores: ScoreFile, plan: Plan, out: Path) -> None:
    pipeline.export_model(Checkpoint.open(model), scores, plan, out, verify=False)


def through_a_bundle(model: Path, scores: ScoreFile, plan: Plan, place: Path) -> Path:
    pipeline.materialize_bundle(Checkpoint.open(model), scores, plan, place / "bundle")
    pipeline.convert_bundle(place / "bundle", place / "export")
    return place / "export"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, ScoreFile]]:
    """By whether embedding and head are one."""
    found = {}
    for tied in (True, False):
        place = tmp_path_factory.mktemp("models")
        model = make_model(place / "tiny", dtype=torch.bfloat16, tie_word_embeddings=tied)
        found[tied] = model, scores_with_moments(model, place / "tiny.acip")
    return found


@pytest.mark.parametrize(("case", "tied"), [*((case, True) for case in CASES), ("onnx, pairs", False)])
def test_the_bytes_are_those_by_way_of_a_bundle(
    made: dict[bool, tuple[Path, ScoreFile]], case: str, tied: bool, tmp_path: Path
) -> None:
    model, scores = made[tied]
    target, layout, decide, changes = CASES[case]
    if changes.get("adapters"):
        scores = make_scores(model, tmp_path / "adapted.acip", adapters=True)
    plan = with_files(make_plan(model, target, layout, decide), model, **changes)
    directly(model, scores, plan, tmp_path / "direct")
    assert contents(tmp_path / "direct") == contents(through_a_bundle(model, scores, plan, tmp_path))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_encoders(target: str, tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "bert")
    layout, decide = {
        "gguf": ("stock", dense(type="f32")),
        "onnx": ("factored", everywhere(representation="factored", rank=16, up_type="f32", down_type="f32")),
    }[target]
    plan = with_files(make_plan(model, target, layout, decide, context=40), model)
    scores = make_scores(model, tmp_path / "bert.acip")
    directly(model, scores, plan, tmp_path / "direct")
    assert contents(tmp_path / "direct") == contents(through_a_bundle(model, scores, plan, tmp_path))


def test_every_tensor_and_what_is_known_of_its_inputs(
    made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is made kept, and made again each time."""
    model, scores = made[True]
    plan = replace(make_plan(model, "gguf", "factored", mixed(("q4_0", "q8_0"))), rounding="feedback")
    checkpoint = Checkpoint.open(model)
    bundle = Bundle.open(pipeline.materialize_bundle(checkpoint, scores, plan, tmp_path / "b"))
    kept = planned_model(checkpoint, scores, plan, Scratch(tmp_path))
    again = planned_model(checkpoint, scores, plan, None)
    # Beside an export they outlive its process.
    (tmp_path / "kept").mkdir()
    outliving = planned_model(checkpoint, scores, plan, None, kept=KeptRoundings(tmp_path / "kept"))
    for name in outliving.shapes:
        outliving.inputs(name), outliving.read(name)
    later = planned_model(checkpoint, scores, plan, None, kept=KeptRoundings(tmp_path / "kept"))
    monkeypatch.setattr(PackedMoment, "feedback_factor", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(later.numbers, "_pair", lambda *_: pytest.fail("fitted again"))
    for name in later.shapes:
        later.inputs(name), later.read(name)
    monkeypatch.undo()
    assert kept.shapes == again.shapes == dict(bundle.shapes)
    for name in bundle.shapes:
        expected, known = bundle.read(name), bundle.inputs(name)
        for model_ in (kept, again, later):
            found, inputs = model_.read(name), model_.inputs(name)
            assert found.dtype == expected.dtype and torch.equal(found, expected)
            assert model_.has_importance(name) == bundle.has_importance(name) == (inputs.importance is not None)
            assert inputs.importance is None or torch.equal(inputs.importance, known.importance)
            assert (inputs.feedback is None) == (known.feedback is None)
            if inputs.feedback is not None:
                for part in ("order", "codes", "steps"):
                    assert (getattr(inputs.feedback, part) == getattr(known.feedback, part)).all()


def stop_at(stage: str, count: int) -> Callable[[Progress], None]:
    """Interrupt when so much of a stage is done."""

    def callback(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= count:
            raise KeyboardInterrupt

    return callback


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keep what takes no minute, and name what is made for bundles: pairs and factors of error feedback."""
    monkeypatch.setattr(kept_until_done, "_WORTH_KEEPING", 0.0)
    seen: list[str] = []
    pair, factor = PlanNumbers._pair, PackedMoment.feedback_factor

    def counted_pair(self: PlanNumbers, *arguments: Any) -> object:
        seen.append("pair")
        return pair(self, *arguments)

    def counted_factor(self: PackedMoment, *arguments: Any) -> object:
        seen.append("factor")
        return factor(self, *arguments)

    monkeypatch.setattr(PlanNumbers, "_pair", counted_pair)
    monkeypatch.setattr(PackedMoment, "feedback_factor", counted_factor)
    return seen


def test_a_bundle_that_was_interrupted_goes_on(
    made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path, counted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, scores = made[True]
    checkpoint, place = Checkpoint.open(model), tmp_path / "place"
    plan = replace(make_plan(model, "gguf", "factored", mixed(("q4_0", "q8_0"))), rounding="feedback")
    smaller = replace(plan, tensors=make_plan(model, "gguf", "factored", mixed(("q5_0", "q8_0"))).tensors)

    def write(plan: Plan, progress: Callable[[Progress], None] = lambda _: None) -> None:
        counted.clear()
        pipeline.materialize_bundle(checkpoint, scores, plan, place / "b", progress=progress)

    def interrupt() -> None:
        with pytest.raises(KeyboardInterrupt):
            write(plan, stop_at("materialize", len(plan.tensors) // 2))
        assert [entry.name for entry in place.iterdir()] == [".b.rounded"]
        assert "the same command goes on" in caplog.text

    expected = {}
    for each in (plan, smaller):
        whole = pipeline.materialize_bundle(checkpoint, scores, each, tmp_path / f"whole {each is plan}")
        expected[plan_sha256(each)] = contents(whole)
    pairs, factors = sum(decision.rank is not None for decision in plan.tensors), counted.count("factor") // 2
    assert pairs > 3 and factors > 1
    interrupt()
    before = list(counted)
    assert 0 < before.count("pair") < pairs
    write(plan)
    assert counted.count("pair") == pairs - before.count("pair")
    assert counted.count("factor") == factors - before.count("factor")
    assert contents(place) == {f"b/{name}": data for name, data in expected[plan_sha256(plan)].items()}
    shutil.rmtree(place)
    # What is left is of another plan.
    interrupt()
    write(smaller)
    assert ".b.rounded is of another model, text or settings; it begins anew" in caplog.text
    assert counted.count("pair") == pairs
    assert contents(place) == {f"b/{name}": data for name, data in expected[plan_sha256(smaller)].items()}


def test_an_export_goes_on_behind_its_bundle(
    made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path, counted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, scores = made[True]
    plan = with_files(make_plan(model, "gguf", "factored", mixed(("q4_0", "q8_0"))), model, rounding="feedback")
    directly(model, scores, plan, tmp_path / "direct")
    place = tmp_path / "place"

    def export(progress: Callable[[Progress], None], force: bool) -> None:
        counted.clear()
        pipeline.export_model(
            Checkpoint.open(model), scores, plan, place / "e", force, False, progress=progress, keep_bundle=True
        )

    with pytest.raises(KeyboardInterrupt):
        export(stop_at("convert", 1), False)
    assert {entry.name for entry in place.iterdir()} == {".e.rounded", "e-bundle"}
    before, stages = (place / "e-bundle").stat().st_ino, list[str]()
    export(lambda progress: stages.append(progress.stage), True)
    assert set(stages) == {"convert"} and not counted
    assert (place / "e-bundle").stat().st_ino == before
    assert {entry.name for entry in place.iterdir()} == {"e", "e-bundle"}
    assert contents(place / "e") == contents(tmp_path / "direct")
    # One that somebody has changed since is none.
    shutil.rmtree(place)
    with pytest.raises(KeyboardInterrupt):
        export(stop_at("convert", 1), False)
    weights = place / "e-bundle" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    export(lambda _: None, True)
    assert "SHA-256 differs" in caplog.text and "it is written again" in caplog.text
    assert contents(place / "e") == contents(tmp_path / "direct")
    Bundle.open(place / "e-bundle", verify_hash=True)


@pytest.mark.parametrize(
    ("target", "case"), [("gguf", "gguf, scaled"), ("gguf", "gguf, pairs"), ("onnx", "onnx, scaled")]
)
def test_factors_in_the_users_cache_change_no_byte(
    made: dict[bool, tuple[Path, ScoreFile]],
    target: str,
    case: str,
    tmp_path: Path,
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, scores = made[True]
    _, layout, decide, changes = CASES[case]
    plan = with_files(make_plan(model, target, layout, decide), model, **changes)
    (tmp_path / "a file").touch()
    exports, factors = [], []
    for least, place in ((1 << 20, "none"), (1, "home"), (1, "home"), (1, "a file")):
        monkeypatch.setattr(feedback_cache, "LEAST_COLUMNS", least)
        monkeypatch.setattr(feedback_cache, "_LEFT_FREE", 0)
        monkeypatch.setattr(feedback_cache, "feedback_directory", lambda place=place: tmp_path / place / "feedback")
        counted.clear()
        directly(model, scores, plan, tmp_path / f"e{len(exports)}")
        exports.append(contents(tmp_path / f"e{len(exports)}"))
        factors.append(counted.count("factor"))
    assert all(each == exports[0] for each in exports)
    once = len(list((tmp_path / "home" / "feedback").iterdir()))
    assert once > 1 and factors[1:3] == [once, 0] and factors[0] == factors[3] >= once


def test_exports_read_the_factors_that_measuring_types_made(
    made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback_cache, "LEAST_COLUMNS", 1)
    monkeypatch.setattr(feedback_cache, "_LEFT_FREE", 0)
    monkeypatch.setattr(feedback_cache, "feedback_directory", lambda: tmp_path / "feedback")
    model, _ = made[True]
    checkpoint, scores = Checkpoint.open(model), scores_with_moments(model, tmp_path / "tiny.acip")
    kept: set[int] = set()
    for target, form in (("gguf", "q4_0"), ("onnx", "int4-b64")):
        request = PlanRequest(target, types=(form,), rounding="feedback")
        rounding_errors(checkpoint, scores, resolve(request, checkpoint).space)
        counted.clear()
        plan = with_files(make_plan(model, target, CASES[f"{target}, scaled"][1], dense(type=form)), model)
        directly(model, scores, replace(plan, rounding="feedback"), tmp_path / target)
        assert not counted
        entries = {entry.stat().st_ino for entry in (tmp_path / "feedback").iterdir()}
        # One format makes them for the other; those of pairs' samples, which are small, are none of them.
        kept = kept or entries
        assert len(entries) > 3 and entries == kept


def test_a_factor_is_kept_in_one_place(
    made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the export only where the user's cache has no room."""
    monkeypatch.setattr(feedback_cache, "LEAST_COLUMNS", 1)
    monkeypatch.setattr(feedback_cache, "feedback_directory", lambda: tmp_path / "feedback")
    _, scores = made[True]
    key = next(iter(scores.second_moments))
    for least_free, kept in ((0, False), (1 << 62, True)):
        monkeypatch.setattr(feedback_cache, "_LEFT_FREE", least_free)
        shutil.rmtree(tmp_path / "feedback", ignore_errors=True)
        store = Scratch(tmp_path)
        FeedbackFactors(scores, store).by_key(key)
        assert bool(list(store)) == kept == (not list((tmp_path / "feedback").iterdir()))
        with monkeypatch.context() as unmade:
            unmade.setattr(PackedMoment, "feedback_factor", lambda *_: pytest.fail("made again"))
            FeedbackFactors(scores, store).by_key(key).check("it")
        store.close()


def test_plans_and_exports_count_the_same_tokens(made: dict[bool, tuple[Path, ScoreFile]]) -> None:
    """Of an input those that its moment was measured on, of an embedding those of gradients."""
    _, scores = made[True]
    embedding = next(iter(scores.embedding_sensitivity))
    told = {**scores.algorithm, "statistics_tokens": 300, "gradient_tokens": 100}
    few = replace(scores, algorithm=told, data=replace(scores.data, tokens=1000))
    layer = next(iter(scores.modules.values())).input_key
    assert few.moment_tokens() == few.moment(layer).tokens == 300
    assert few.moment_tokens(embedding) == few.moment(embedding).tokens == 100
    # No more than there were; all of them where the ranking does not say.
    short = replace(few, data=replace(few.data, tokens=90))
    assert (short.moment_tokens(), short.moment_tokens(embedding)) == (90, 90)
    silent = {name: value for name, value in told.items() if not name.endswith("_tokens")}
    assert replace(few, algorithm=silent).moment_tokens() == 1000
    for key in (layer, embedding):
        exported, planned = FeedbackFactors(few).by_key(key), _Inputs.of(few, key, True).factor
        assert planned is not None and np.array_equal(exported.codes, planned.codes)
        fewer = replace(few, algorithm={**told, "statistics_tokens": 50, "gradient_tokens": 50})
        assert not np.array_equal(exported.codes, FeedbackFactors(fewer).by_key(key).codes)


def test_only_pairs_are_kept_on_disk(made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path) -> None:
    model, scores = made[True]
    checkpoint = Checkpoint.open(model)
    for decide, kept in ((dense(type="q8_0"), 0), (mixed(("q4_0", "q8_0")), 2 * 3 * 64 * (256 + 512))):
        plan, scratch = make_plan(model, "gguf", "factored", decide), Scratch(tmp_path)
        opened = planned_model(checkpoint, scores, plan, scratch)
        for _ in range(2):
            for name in opened.shapes:
                opened.read(name)
        importance = 2 * 3 * 64 + 2 * (2 * 256 + 512) if kept else 0
        assert os.fstat(scratch._file.fileno()).st_size == 4 * (kept + importance)
        scratch.close()


def test_a_bundle_is_kept_when_asked(made: dict[bool, tuple[Path, ScoreFile]], tmp_path: Path) -> None:
    model, scores = made[True]
    plan = with_files(make_plan(model, "gguf", "stock", dense(type="q8_0")), model)
    checkpoint = Checkpoint.open(model)
    report = pipeline.export_model(checkpoint, scores, plan, tmp_path / "e", keep_bundle=True, sizes=())
    assert report is not None and report.passed
    assert Bundle.open(tmp_path / "e-bundle", verify_hash=True).plan == plan
    directly(model, scores, plan, tmp_path / "direct")
    assert (tmp_path / "e" / "model.gguf").read_bytes() == (tmp_path / "direct" / "model.gguf").read_bytes()
    assert not list(tmp_path.glob("*direct-bundle"))
