"""Predictions are scaled to what rounding each layer, and each class, was measured to cost, once for a format."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import acip_export
from acip_export.api import calibration
from acip_export.api.calibration import calibrated_errors
from acip_export.api.rounding_errors import rounding_errors
from acip_export.artifacts.measured_losses import (
    MeasuredLoss,
    MeasuredLosses,
    cache_file,
    class_losses,
    load_measured_losses,
)
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import ScoreFile
from acip_export.measurement import passes
from acip_export.measurement.block_passes import BlockPasses, MeasuredDivergence
from acip_export.measurement.passes import layer_passes, passes_for
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from acip_export.progress import Progress

CONTEXT = 32
ASKED = {"budget": "1MB", "format": "gguf", "scope": "file", "context": 64, "types": ["q8_0", "q4_0"]}


@pytest.fixture(scope="module")
def ranked(model: Path, text: Path) -> ScoreFile:
    acip_export.rank(model, text, out=model / "m.acip", algorithm="fisher", context=CONTEXT)
    return acip_export.load_scores(model / "m.acip")


@pytest.fixture
def copied(model: Path, ranked: ScoreFile, tmp_path: Path) -> Path:
    """Its directory without measured losses."""
    assert ranked.file is not None
    shutil.copytree(model, tmp_path / "m", ignore=shutil.ignore_patterns("*losses*"))
    return tmp_path / "m"


def stages(**options: object) -> tuple[acip_export.Plan, set[str]]:
    steps: list[Progress] = []
    plan = acip_export.plan(progress=steps.append, **{**ASKED, **options})  # type: ignore[arg-type]
    return plan, {step.stage for step in steps}


def test_what_takes_long_is_announced_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stages(model=copied)
    assert not caplog.messages  # seconds
    cache_file(copied / "m.acip", "gguf", "feedback").unlink()
    monkeypatch.setattr(calibration, "_WORTH_SAYING", 0)
    stages(model=copied)
    (said,) = caplog.messages
    assert re.fullmatch(
        r"this model's first plan for gguf measures what rounding its layers costs: about \d+ s, once", said
    )
    stages(model=copied)
    assert len(caplog.messages) == 1


def test_the_first_plan_measures_and_the_others_know(copied: Path) -> None:
    plain, measured = stages(model=copied, calibrate=False)
    assert not plain.calibrated and "calibrate" not in measured
    plan, measured = stages(model=copied)
    assert plan.calibrated and {"calibrate layers", "calibrate"} <= measured and not plan.notes[1:]
    file = cache_file(copied / "m.acip", "gguf", "feedback")
    known = json.loads(file.read_text())
    assert known["tokens"] > 0
    assert set(known["classes"]) == {
        "model.embed_tokens",
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    layers = list(Checkpoint.open(copied).linear_modules)
    assert set(known["layers"]) == {f"{name}.weight" for name in layers} and len(layers) > 7
    assert all(len(types) == 1 for types in known["layers"].values())
    again, measured = stages(model=copied)
    assert again == plan and not {"calibrate layers", "calibrate"} & measured
    file.write_text("{")
    assert stages(model=copied) == (plan, {"calibrate layers", "calibrate"} | measured)


def test_between_layers_and_classes_a_killed_plan_goes_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same figures, where fewer tokens go through more passes."""
    monkeypatch.setattr(calibration, "_LEAST_TOKENS", CONTEXT)
    checkpoint = Checkpoint.open(copied)
    monkeypatch.setattr(calibration, "_OPERATIONS", 5000 * checkpoint.weight_bytes)
    plan, _ = stages(model=copied)
    file = cache_file(copied / "m.acip", "gguf", "feedback")
    known = json.loads(file.read_text())
    assert CONTEXT < known["tokens"] < 1024
    file.unlink()

    def killed(step: Progress) -> None:
        if step.stage == "calibrate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acip_export.plan(model=copied, progress=killed, **ASKED)  # type: ignore[arg-type]
    half = json.loads(file.read_text())
    assert half["layers"] == known["layers"] and not half["classes"] and half["tokens"] == 0
    again, measured = stages(model=copied)
    assert again == plan and "calibrate" in measured and "calibrate layers" not in measured
    assert json.loads(file.read_text()) == known


def test_layers_take_little_text(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []

    def measured(*given: object) -> list[MeasuredLoss]:
        read.append(given[5].shape)  # type: ignore[attr-defined]
        return [MeasuredLoss(each.predicted, each.predicted, 0.0) for each in given[4]]  # type: ignore[attr-defined]

    monkeypatch.setattr("acip_export.measurement.classes.measure_classes", measured)
    monkeypatch.setattr(calibration, "_LAYER_TOKENS", CONTEXT)
    monkeypatch.setattr(calibration, "_LAYER_WINDOW", CONTEXT)
    monkeypatch.setattr(calibration, "_LEAST_TOKENS", CONTEXT)
    stages(model=copied)
    layers, classes = read
    assert layers == (1, CONTEXT) and classes[0] * classes[1] > CONTEXT


def test_a_model_that_rounding_breaks_is_not_calibrated(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = MeasuredDivergence(float("nan"), float("nan"), 0.0, 1)
    monkeypatch.setattr(BlockPasses, "divergences", lambda _self, variants, *_: [broken for _ in variants])
    plan, _ = stages(model=copied)
    assert not plan.calibrated and plan.notes[-1].startswith("predicted losses are not calibrated on this model: with ")
    assert plan.notes[-1].endswith("its logits are not finite")
    assert not cache_file(copied / "m.acip", "gguf", "feedback").exists()


@pytest.mark.parametrize("caches", [{}, {"cache_type": "auto"}])
def test_a_budget_that_nothing_fits_is_refused_before_anything_is_measured(
    copied: Path, caches: dict[str, str]
) -> None:
    for file in copied.glob("*.acip.*"):
        file.unlink()
    with pytest.raises(acip_export.InfeasibleBudgetError, match="The smallest feasible budget"):
        stages(model=copied, budget="20kB", scope="memory", **caches)
    assert not list(copied.glob("*.acip.*"))
    with pytest.raises(acip_export.UsageError, match="scope is 'runtime', expected "):
        stages(model=copied, scope="runtime")


def test_what_was_measured_is_what_the_class_loses(copied: Path) -> None:
    """All of a class in one type, and nothing else: the calibrated prediction is the measured divergence."""
    checkpoint, scores = Checkpoint.open(copied), acip_export.load_scores(copied / "m.acip")
    question = resolve(PlanRequest("gguf", types=("q8_0", "q4_0"), rounding="feedback"), checkpoint)
    errors = rounding_errors(checkpoint, scores, question.space)
    scaled, why_not = calibrated_errors(checkpoint, scores, question.space, errors, question.rule)
    assert why_not == ()
    known = json.loads(cache_file(copied / "m.acip", "gguf", "feedback").read_text())
    sums, inputs = class_losses(scaled), class_losses(replace(scaled, dense=scaled.inputs))
    with_inputs = 0
    nothing = MeasuredLosses("gguf", errors.quantizer, errors.scores_sha256)
    losses = load_measured_losses(cache_file(copied / "m.acip", "gguf", "feedback"), nothing)
    for each in passes_for(losses.by_layers(errors), scores.embedding_sensitivity, shapes_of(checkpoint)):
        measured = known["inputs" if each.inputs else "classes"][each.name][each.type]["measured"]
        if not each.inputs:
            assert sums[each.name][each.type] == pytest.approx(measured, rel=1e-6)
        elif measured > sums[each.name][each.type]:
            assert sums[each.name][each.type] + inputs[each.name][each.type] == pytest.approx(measured, rel=1e-6)
            with_inputs += 1
    assert with_inputs > 4


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def test_of_very_large_models_some_layers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they lose more, or less, than was predicted of them is what their class does."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)]
    dense = {name: {"q8_0": 0.001, "q4_0": 0.01 * (1 + layer)} for layer, name in enumerate(names)}
    dense["model.embed_tokens.weight"] = {"q8_0": 0.001, "q4_0": 0.03}
    errors = RoundingErrors("gguf", "test", "0", dense)
    shapes = dict.fromkeys(dense, (64, 32))
    whole = passes_for(errors, ["model.embed_tokens.weight"], shapes)
    # Of five matrices of the fourteen: one type of all layers, two of the embedding.
    monkeypatch.setattr(passes, "_ROUNDING_OPERATIONS", 5 * 2 * 64 * 32 * 32)
    some = passes_for(errors, ["model.embed_tokens.weight"], shapes)
    assert [(each.name, each.type, each.inputs) for each in some] == [
        (each.name, each.type, each.inputs) for each in whole
    ]
    for each in some:
        if each.name == "mlp.up_proj":
            assert each.tensors == {names[1], names[4], names[7], names[10]}
        else:
            assert each.tensors == {"model.embed_tokens.weight"}
        assert each.predicted == pytest.approx(sum(dense[name][each.type] for name in each.tensors))
    # Twice of what was predicted, and inputs that cost as much again.
    losses = MeasuredLosses("gguf", "test", "0")
    for each in some:
        measured = MeasuredLoss(each.predicted, (4 if each.inputs else 2) * each.predicted, 0.0)
        losses = losses.with_loss(each.name, each.type, each.inputs, measured)
    scaled = losses.calibrated(errors)
    for name, known in dense.items():
        assert scaled.dense[name] == pytest.approx({type_: 2 * loss for type_, loss in known.items()})
        assert scaled.inputs[name]["q8_0"] == pytest.approx(2 * known["q8_0"])


def test_layers_share_what_their_class_loses_as_they_were_measured() -> None:
    up = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    down = "model.layers.0.mlp.down_proj.weight"
    dense = {name: {"q8_0": 0.001, "q4_0": 0.01} for name in (*up, down)}
    pairs = {"model.layers.1.mlp.up_proj": {"q4_0*q8_0": ((0.5, 2.0),), "q4_0+": ((0.0, 1.0), (0.5, 0.5))}}
    errors = RoundingErrors("gguf", "test", "0", dense, pairs)
    # The second loses twenty times of what was predicted, the third nothing that can be told from noise.
    measured = {up[0]: (0.02, 0.001), up[1]: (0.2, 0.01), up[2]: (0.0, 0.005)}
    layers = {name: {"q4_0": MeasuredLoss(0.01, loss, error)} for name, (loss, error) in measured.items()}
    scaled = MeasuredLosses("gguf", "test", "0", layers=layers).by_layers(errors)
    factors = [each * 0.03 / 0.225 for each in (2.0, 20.0, 0.5)]
    assert [scaled.dense[name]["q4_0"] for name in up] == pytest.approx([0.01 * each for each in (*factors, 1.0)])
    assert [scaled.dense[name]["q8_0"] for name in up] == pytest.approx([0.001 * each for each in (*factors, 1.0)])
    assert class_losses(scaled)["mlp.up_proj"]["q4_0"] == pytest.approx(0.04) and scaled.dense[down] == dense[down]
    assert scaled.pairs["model.layers.1.mlp.up_proj"] == {
        "q4_0*q8_0": (pytest.approx((0.5, 2.0 * factors[1])),),
        "q4_0+": ((0.0, 1.0), (0.5, 0.5)),
    }
    # The class then loses what all of it was measured to: shares stay.
    whole = {"mlp.up_proj": {"q4_0": MeasuredLoss(0.04, 0.12, 0.0)}}
    both = MeasuredLosses("gguf", "test", "0", classes=whole, layers=layers).calibrated(errors)
    assert [both.dense[name]["q4_0"] for name in up] == pytest.approx([3 * scaled.dense[name]["q4_0"] for name in up])


def test_of_layers_that_come_later_the_class_is_measured_again() -> None:
    one = {"q4_0": MeasuredLoss(0.01, 0.02, 0.0)}
    losses = MeasuredLosses("gguf", "test", "0", classes={"mlp.up_proj": one, "mlp.down_proj": one})
    losses = replace(losses, inputs={"mlp.up_proj": one})
    more = losses.with_layers({"model.layers.0.mlp.up_proj.weight": one})
    assert more.classes == {"mlp.down_proj": one} and more.inputs == {}
    assert more.with_layers({"model.layers.1.mlp.up_proj.weight": one}).layers.keys() == {
        f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)
    }


def test_a_layer_weighs_a_hundred_times_of_its_class_at_most() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(300)]
    errors = RoundingErrors("gguf", "test", "0", {name: {"q4_0": 0.01} for name in names})
    layers = {name: {"q4_0": MeasuredLoss(0.01, 1e-9, 0.0)} for name in names[1:]}
    layers[names[0]] = {"q4_0": MeasuredLoss(0.01, 1.0, 0.0)}
    scaled = MeasuredLosses("gguf", "test", "0", layers=layers).by_layers(errors)
    assert [scaled.dense[name]["q4_0"] for name in names[:2]] == pytest.approx([1.0, 0.0001])


def test_the_layers_that_are_predicted_to_lose_most_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of whole classes, as many as there is time for, none of classes of one layer, in one type each."""
    losses = {"mlp.up_proj": 0.01, "mlp.down_proj": 0.02, "self_attn.q_proj": 0.001}
    dense = {
        f"model.layers.{layer}.{name}.weight": {"q8_0": loss / 100, "q4_0": loss, "f16": 1e-9}
        for name, loss in losses.items()
        for layer in (10, 9)
    }
    dense |= {"model.embed_tokens.weight": {"q4_0": 9.0}, "model.layers.9.odd.weight": {"q4_0": 9.0}}
    errors, shapes = RoundingErrors("gguf", "test", "0", dense), dict.fromkeys(dense, (64, 32))
    whole = layer_passes(errors, ["model.embed_tokens.weight"], shapes, 1000.0)
    assert [(each.name, each.type) for each in whole] == [
        (f"model.layers.{layer}.{name}.weight", "q4_0")
        for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
        for layer in (9, 10)
    ]
    assert all(each.tensors == {each.name} and not each.inputs for each in whole)
    # Room for four layers: half a pass each, and their rounding.
    monkeypatch.setattr(passes, "_LAYER_OPERATIONS", 4 * (500 + 2 * 64 * 32 * 32))
    assert layer_passes(errors, ["model.embed_tokens.weight"], shapes, 1000.0) == whole[:4]


def test_rounded_inputs_are_added() -> None:
    """By the blocks in which they are rounded, shared by layers as their weights' losses are."""
    up, down = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    dense = {
        up: {"q8_0": 0.001, "q6_k": 0.002, "q4_0": 0.3, "f16": 1e-9},
        down: {"q8_0": 0.003, "q6_k": 0.006, "q4_0": 0.5},
    }
    weights = {"q8_0": MeasuredLoss(0.004, 0.004, 0.0), "q6_k": MeasuredLoss(0.008, 0.008, 0.0)}
    inputs = {"q8_0": MeasuredLoss(0.004, 0.024, 0.0), "q6_k": MeasuredLoss(0.008, 0.048, 0.0)}
    errors = RoundingErrors("gguf", "test", "0", dense)
    losses = MeasuredLosses("gguf", "test", "0", classes={"mlp.up_proj": weights}, inputs={"mlp.up_proj": inputs})
    scaled = losses.calibrated(errors)
    assert scaled.dense[up] == pytest.approx(dense[up])
    assert scaled.inputs[up] == pytest.approx({"q8_0": 0.005, "q6_k": 0.01, "q4_0": 0.005})
    assert scaled.inputs[down] == pytest.approx({"q8_0": 0.015, "q6_k": 0.03, "q4_0": 0.015})


def test_it_says_why_not(copied: Path, text: Path) -> None:
    hidden = text.with_name("elsewhere.txt")
    text.rename(hidden)
    try:
        plan, measured = stages(model=copied)
    finally:
        hidden.rename(text)
    assert not plan.calibrated and "calibrate" not in measured
    assert plan.notes[-1] == (
        "predicted losses are not calibrated on this model: the text that the ranking held out is not here"
    )


def test_scores_in_no_file_keep_what_was_measured(model: Path, ranked: ScoreFile) -> None:
    scores = replace(ranked, file=None)
    plan, measured = stages(model=model, scores=scores)
    assert plan.calibrated and "calibrate" in measured
    again, measured = stages(model=model, scores=scores)
    assert again == plan and "calibrate" not in measured


def test_factors_are_interpolated_between_types() -> None:
    dense = {
        f"model.layers.{layer}.mlp.up_proj.weight": {"q8_0": 0.0001, "q5_0": 0.001, "q4_0": 0.01, "q2_k": 0.1}
        for layer in (0, 1)
    }
    pairs = {"model.layers.0.mlp.up_proj": {"q4_0*q8_0": ((0.5, 2.0),), "q4_0+": ((0.0, 1.0), (0.5, 0.5))}}
    other = {"model.layers.0.mlp.down_proj.weight": {"q4_0": 0.5}}
    errors = RoundingErrors("gguf", "test", "0", {**dense, **other}, pairs)
    measured = {"q8_0": MeasuredLoss(0.0002, 0.0002, 0.0), "q4_0": MeasuredLoss(0.02, 0.08, 0.0)}
    scaled = MeasuredLosses("gguf", "test", "0", classes={"mlp.up_proj": measured}).calibrated(errors)
    for name in dense:
        assert scaled.dense[name] == pytest.approx({"q8_0": 0.0001, "q5_0": 0.002, "q4_0": 0.04, "q2_k": 0.4})
    assert scaled.dense["model.layers.0.mlp.down_proj.weight"] == {"q4_0": 0.5}
    assert scaled.pairs["model.layers.0.mlp.up_proj"] == {
        "q4_0*q8_0": (pytest.approx((0.5, 8.0)),),
        "q4_0+": ((0.0, 1.0), (0.5, 0.5)),
    }
