"""What rounding costs on a model's own weights: measured with the real quantizers, cached, and used by the planner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from acip_export import api as pipeline
from acip_export.artifacts import cache
from acip_export.artifacts.plan import decision_bytes
from acip_export.artifacts.rounding_errors import (
    RoundingErrors,
    cache_file,
    load_rounding_errors,
    pair_key,
    save_rounding_errors,
)
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.formats.registry import export_format
from acip_export.materialization.factors import Norm
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, resolve
from acip_export.progress import Progress
from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import weight_type
from converters.gguf import ggml_library
from tests.planning.problems import planned
from tests.support import make_model, make_scores

REQUESTS = {
    "gguf": PlanRequest("gguf", 2_000_000, "file", types=("q8_0", "q4_0", "q2_k")),
    "onnx": PlanRequest("onnx", 900_000, "file", types=("int8", "int4")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)
    make_scores(directory)
    return directory


def measure(checkpoint: Checkpoint, scores: ScoreFile, request: PlanRequest) -> RoundingErrors:
    return pipeline.rounding_errors(checkpoint, scores, resolve(request, checkpoint).space)


@pytest.fixture(scope="module")
def measured(model: Path) -> dict[str, RoundingErrors]:
    checkpoint, scores = Checkpoint.open(model), load_scores(model / "tiny.acip")
    return {name: measure(checkpoint, scores, request) for name, request in REQUESTS.items()}


@pytest.mark.parametrize("target", REQUESTS)
def test_dense_losses_are_those_of_all_rows(target: str, model: Path, measured: dict[str, RoundingErrors]) -> None:
    checkpoint, scores = Checkpoint.open(model), load_scores(model / "tiny.acip")
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        module, weight = scores.modules[name], checkpoint.read(f"{name}.weight")
        norm = Norm.of(module, scores.second_moments, weight)
        energy = norm.loss(weight)  # identity moments: rounding all of it away
        for form in REQUESTS[target].types:
            rounded = export_format(target).round_trip(
                weight, form, InputMoments(torch.from_numpy(module.input_moment))
            )
            exact = module.sensitivity * norm.loss(rounded - weight) / energy
            # 128 rows of 512 or all of them: errors of rows differ by about a tenth.
            assert measured[target].dense[f"{name}.weight"][form] == pytest.approx(exact, rel=0.1)
    embedding = measured[target].dense["model.embed_tokens.weight"]
    types = REQUESTS[target].types
    assert [embedding[t] for t in types] == sorted(embedding[t] for t in types)


def test_fitted_pairs_lose_less_than_the_table_says(measured: dict[str, RoundingErrors]) -> None:
    pairs = measured["onnx"].pairs["model.layers.0.mlp.up_proj"]
    assert pairs.keys() == {pair_key(t, t) for t in ("int8", "int4")}
    for points in pairs.values():
        assert all(0.05 < ratio < 1.1 for _, ratio in points)
        assert [share for share, _ in points] == sorted({share for share, _ in points})
    assert not measured["gguf"].pairs  # the layout has no pairs, so none were measured


@pytest.mark.slow
def test_corrections_are_measured_and_planned(model: Path) -> None:
    """The adapter layout's bases with a low-rank correction: only where it was measured what they gain."""
    checkpoint, scores = Checkpoint.open(model), load_scores(model / "tiny.acip")
    request = PlanRequest("gguf", 700_000, "file", layout="lora", types=("q8_0", "q2_k"))
    errors = measure(checkpoint, scores, request)
    ratios = [errors.residual_ratio("model.layers.0.mlp.up_proj", "q2_k", share) for share in (0.0, 0.1, 0.25)]
    assert ratios[0] == 1
    assert ratios == sorted(ratios, reverse=True)
    assert errors.residual_ratio("model.layers.0.mlp.up_proj", "q3_k", 0.1) is None
    plans = {name: planned(checkpoint, scores, request, e) for name, e in (("with", errors), ("no", None))}
    assert not any(d.representation == "residual" for d in plans["no"].tensors)
    cheap = dict.fromkeys(("q2_k+", "q8_0+"), ((0.0, 1.0), (0.05, 0.001)))
    better = replace(errors, pairs=dict.fromkeys(scores.modules, cheap))
    chosen = [d for d in planned(checkpoint, scores, request, better).tensors if d.rank]
    assert any(d.representation == "residual" for d in chosen)
    assert all(d.nbytes == decision_bytes(d, "gguf") for d in chosen)


def test_measured_once(model: Path, measured: dict[str, RoundingErrors]) -> None:
    file = cache_file(model / "tiny.acip", "onnx")
    before = file.read_bytes(), file.stat().st_mtime_ns
    checkpoint, scores = Checkpoint.open(model), load_scores(model / "tiny.acip")
    again = measure(checkpoint, scores, REQUESTS["onnx"])
    assert again == measured["onnx"]
    assert before == (file.read_bytes(), file.stat().st_mtime_ns)
    more = measure(checkpoint, scores, replace(REQUESTS["onnx"], types=("int8", "int2")))
    assert {"int8", "int4", "int2"} <= more.dense["model.layers.0.mlp.up_proj.weight"].keys()
    assert load_rounding_errors(file, "onnx", more.quantizer, more.scores_sha256) == more


def test_measuring_goes_on_where_it_was_interrupted(
    model: Path, measured: dict[str, RoundingErrors], tmp_path: Path
) -> None:
    """To the same file, whether it was among matrices or pairs."""
    copy = tmp_path / "m"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.rounding-*"))
    checkpoint, scores = Checkpoint.open(copy), load_scores(copy / "tiny.acip")
    space, steps = resolve(REQUESTS["onnx"], checkpoint).space, list[Progress]()
    stops = [1, 8, 5]

    def stop(progress: Progress) -> None:
        steps.append(progress)
        if stops and progress.done == stops[0]:
            del stops[0]
            raise KeyboardInterrupt

    for total in (15, 14, 6):
        with pytest.raises(KeyboardInterrupt):
            pipeline.rounding_errors(checkpoint, scores, space, stop)
        assert steps[-1].total == total
    assert pipeline.rounding_errors(checkpoint, scores, space, stop) == measured["onnx"]
    assert steps[-1].total == 1
    file = cache_file(copy / "tiny.acip", "onnx")
    written = file.read_bytes()
    save_rounding_errors(measured["onnx"], file)
    assert file.read_bytes() == written


def test_a_process_that_is_killed_loses_seconds_of_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    for lost, able, expected in ((0.0, True, 2), (1000.0, True, 1), (0.0, False, 2)):
        monkeypatch.setattr(cache, "_AT_MOST_LOST", lost)
        saved: list[RoundingErrors] = []
        with (
            pytest.raises(KeyboardInterrupt),
            cache.kept_as_it_grows(lambda errors, to=saved, able=able: to.append(errors) or able) as grown,
        ):
            grown(NOTHING)
            grown(EXAMPLE)
            raise KeyboardInterrupt
        assert len(saved) == expected and saved[-1] == EXAMPLE


def test_scores_in_no_file_are_measured_once_each(model: Path, measured: dict[str, RoundingErrors]) -> None:
    checkpoint, stored = Checkpoint.open(model), load_scores(model / "tiny.acip")
    space = resolve(PlanRequest("onnx", 900_000, "file", types=("int8",)), checkpoint).space
    first, second = replace(stored, file=None), replace(stored, file=None)
    counts = []
    for scores in (first, second, first, second):
        steps: list[object] = []
        errors = pipeline.rounding_errors(checkpoint, scores, space, steps.append)
        assert all(types["int8"] == measured["onnx"].dense[name]["int8"] for name, types in errors.dense.items())
        counts.append(len(steps))
    assert counts[0] == counts[1] > 0 == counts[2] == counts[3]
    assert not replace(first, data={}).rounding_errors  # other scores: measured anew


def test_a_directory_that_cannot_be_written_to(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "m"
    shutil.copytree(model, copy)
    cache_file(copy / "tiny.acip", "onnx").unlink(missing_ok=True)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    errors = measure(Checkpoint.open(copy), load_scores(copy / "tiny.acip"), REQUESTS["onnx"])
    assert errors.dense
    assert "measured again next time" in caplog.text


NOTHING = RoundingErrors(format="onnx", quantizer="test 1", scores_sha256="abc")
EXAMPLE = replace(
    NOTHING,
    dense={"a.weight": {"int8": 0.001, "int4": 0.1}},
    # Types that fit no rank of the layer are noted, too: they need not be tried again.
    pairs={"a": {"int4*int4": ((0.25, 0.4), (0.75, 0.1)), "int8*int4": ()}},
)


def test_between_measured_ranks() -> None:
    ratios = EXAMPLE.pair_ratios("a", "int4", "int4", np.array([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert ratios == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.1])  # geometric mean half way
    assert EXAMPLE.pair_ratios("a", "int8", "int8", np.array([0.5])) == 1
    assert EXAMPLE.pair_ratios("a", "int8", "int4", np.array([0.5])) == 1
    assert EXAMPLE.dense_loss("a.weight", "int4", 7.0) == 0.1
    assert EXAMPLE.dense_loss("b.weight", "int4", 7.0) == 7.0


def _damage(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda file: file.write_text(change(file.read_text()))


@pytest.mark.parametrize(
    ("harm", "warns"),
    [
        (_damage(lambda s: s[: len(s) // 2]), True),
        (_damage(lambda s: s.replace("0.001", "-1")), True),
        (_damage(lambda s: s.replace("0.1", "NaN")), True),
        (_damage(lambda s: s.replace('"dense"', '"thick"')), True),
        (_damage(lambda _: "[]"), True),
        (_damage(lambda s: s.replace('"version": 2', '"version": 3')), False),
        (_damage(lambda s: s.replace("test 1", "test 2")), False),
        (_damage(lambda s: s.replace("abc", "abd")), False),
        (lambda file: file.unlink(), False),
    ],
)
def test_a_cache_that_does_not_hold_is_no_cache(
    harm: Callable[[Path], None], warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cache.json"
    save_rounding_errors(EXAMPLE, file)
    assert load_rounding_errors(file, "onnx", "test 1", "abc") == EXAMPLE
    assert json.loads(file.read_text())["artifact"] == "acip-rounding-errors"
    harm(file)
    assert load_rounding_errors(file, "onnx", "test 1", "abc") == NOTHING
    assert ("measured again" in caplog.text) == warns


def test_no_room_for_the_cache_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a file").touch()
    save_rounding_errors(EXAMPLE, tmp_path / "a file" / "cache.json")
    assert "measured again next time" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["a file"]


def test_the_plan_follows_what_was_measured(model: Path) -> None:
    """A type that this model's weights do not bear is avoided; the table alone would take it."""
    checkpoint = Checkpoint.open(model)
    scores: ScoreFile = load_scores(model / "tiny.acip")
    request = PlanRequest("gguf", 500_000, "file", types=("q8_0", "q4_0", "q3_k"))
    tensor = "model.layers.0.mlp.up_proj.weight"
    chosen = {d.name: d.type for d in planned(checkpoint, scores, request).tensors}
    assert chosen[tensor] != "q8_0"
    bad = dict.fromkeys(("q4_0", "q3_k"), 50.0) | {"q8_0": 1e-6}
    errors = RoundingErrors("gguf", "", scores.sha256, {tensor: bad})
    plan = planned(checkpoint, scores, request, errors)
    assert {d.name: d.type for d in plan.tensors}[tensor] == "q8_0"
    assert weight_type("gguf", "q8_0").nbytes(512, 256) == next(d.nbytes for d in plan.tensors if d.name == tensor)


@pytest.mark.slow
def test_a_plan_without_the_quantizer_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "m")
    for known in (tmp_path / "m").glob("*.rounding-*.json"):
        known.unlink()
    checkpoint, scores = Checkpoint.open(tmp_path / "m"), load_scores(tmp_path / "m" / "tiny.acip")
    request = PlanRequest("gguf", 600_000, "file", types=("q8_0", "q4_0", "f16"))
    with monkeypatch.context() as patch:
        patch.setattr(ggml_library, "load_library", lambda: None)
        gaussian = pipeline.plan_export(checkpoint, scores, request)
    (said,) = [note for note in gaussian.notes if "Gaussian" in note]
    rounded = sum(d.type in ("q8_0", "q4_0") for d in gaussian.tensors)
    assert f"{rounded} of {rounded} quantized matrices" in said
    assert not any("Gaussian" in note for note in pipeline.plan_export(checkpoint, scores, request).notes)
    pairs = replace(request, layout="lora", types=("q8_0", "q2_k"))
    assert not any("Gaussian" in note for note in pipeline.plan_export(checkpoint, scores, pairs).notes)
