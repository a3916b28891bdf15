"""q2_0: the scale is the best there is, ggml reads what was meant, and old runtimes never get it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_export.api import export_model, plan_export
from acip_export.artifacts.plan import dumps_plan, load_plan, save_plan
from acip_export.artifacts.speeds import LayerSpeed, MatrixSpeed, RuntimeSpeed
from acip_export.errors import InfeasibleBudgetError, PlanFileError, UnsupportedError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, planner, resolve
from acip_export.rounding.quantizer import InputMoments
from acip_export.weight_types import first_release, is_older, weight_type
from converters.gguf import ggml_library as ggml
from converters.gguf import options, two_bits
from converters.gguf.rounding import round_trip
from converters.gguf.types import GGML
from tests.support import make_model, make_scores

Floats = npt.NDArray[np.float32]


def read(data: npt.NDArray[np.uint8], shape: tuple[int, int]) -> Floats:
    return ggml.dequantize(data, shape, "q2_0")


def cost(blocks: Floats, weights: Floats, scale: Floats) -> npt.NDArray[np.float64]:
    """Weighted squared error of each block with a scale, (blocks,)."""
    codes = np.clip(np.rint(blocks / scale), -1, 2)
    return ((codes * scale - blocks) ** 2 * weights).sum(axis=1, dtype=np.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([1, 3]), weighted=st.booleans())
def test_no_scale_is_better(seed: int, power: int, weighted: bool) -> None:
    """Against thousands of scales of both signs; rounding the best one to float16 costs next to nothing."""
    random = np.random.default_rng(seed)
    blocks = random.standard_normal((8, 64)).astype(np.float32) ** power
    importance = random.random(64).astype(np.float32) + 0.01
    # As ggml weighs importance in its other types: large weights count for more.
    weights = importance * np.sqrt((blocks**2).mean(axis=1, keepdims=True) + blocks**2)
    weights = weights if weighted else np.ones_like(blocks)
    back = read(two_bits.quantize(blocks, importance if weighted else None), (8, 64))
    found = ((back - blocks) ** 2 * weights).sum(axis=1, dtype=np.float64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    shares = np.linspace(0.02, 2.1, 2000, dtype=np.float32)
    best = np.min([cost(blocks, weights, sign * share * largest) for share in shares for sign in (1, -1)], axis=0)
    assert (found <= best * (1 + 1e-4)).all()


def test_ggml_reads_the_nearest_of_four_numbers() -> None:
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
    data = ggml.quantize(weight, "q2_0")
    scales = data.reshape(-1, 18)[:, :2].copy().view(np.float16).astype(np.float32)
    blocks = weight.numpy().reshape(-1, 64)
    levels = scales[..., None] * np.array([-1, 0, 1, 2], np.float32)
    expected = np.abs(blocks[..., None] - levels).min(axis=2)
    found = np.abs(read(data, (16, 192)).reshape(-1, 64) - blocks)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (scales < 0).any()
    assert (scales > 0).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_of_three_or_four_values_lose_nothing(sign: int) -> None:
    """As models have them that were trained in two bits."""
    codes = torch.randint(-1, 3, (32, 128), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::64], codes[:, 1::64] = -1, 2  # both ends in every block, so that no other scale means the same
    for weight in (sign * 0.25 * codes, sign * 0.25 * codes.clamp(-1, 1)):
        torch.testing.assert_close(round_trip(weight, "q2_0", None), weight, rtol=0, atol=0)


def test_zeros_stay_and_ggmls_own_quantizer_loses_four_times_as_much() -> None:
    assert not round_trip(torch.zeros(4, 64), "q2_0", None).any()
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    library = ggml.load_library()
    assert library is not None
    theirs = np.empty(weight_type("gguf", "q2_0").nbytes(64, 512), np.uint8)
    assert ggml._quantize_rows(library, "q2_0", rows, theirs, None) == theirs.nbytes
    ours = two_bits.quantize(rows, None)
    errors = [float(((read(data, rows.shape) - rows) ** 2).mean()) for data in (ours, theirs)]
    assert 4 * errors[0] < errors[1]


@pytest.mark.parametrize("weight", [1e6, np.nan, np.inf, -np.inf])
def test_what_float16_cannot_hold_is_refused(weight: float) -> None:
    matrix = torch.ones(2, 64)
    matrix[1, 5] = weight
    with pytest.raises(UnsupportedError, match=r"too large for q2_0, or no number; choose bf16 or f32"):
        ggml.quantize(matrix, "q2_0")


@pytest.mark.parametrize("power", [-120, -80, 80, 120])
def test_how_large_importance_is_changes_no_byte(power: int) -> None:
    rows = np.random.default_rng(1).standard_normal((16, 128)).astype(np.float32)
    importance = np.random.default_rng(2).random(128).astype(np.float32) + np.float32(0.1)
    assert np.array_equal(
        two_bits.quantize(rows, importance * np.float32(2.0**power)), two_bits.quantize(rows, importance)
    )


@pytest.mark.parametrize("power", [-14, 14])
def test_how_large_weights_are_changes_no_code(power: int) -> None:
    rows = np.random.default_rng(3).standard_normal((16, 128)).astype(np.float32)
    data, other = (two_bits.quantize(each, None).reshape(-1, 18) for each in (rows, rows * np.float32(2.0**power)))
    if power > 0:  # below, float16 has fewer digits
        assert np.array_equal(other[:, 2:], data[:, 2:])
    assert float(((read(other.reshape(-1), rows.shape) / 2.0**power - rows) ** 2).mean()) < 0.15


def test_blocks_of_one_side_of_few_values_and_of_one_weight_lose_no_more_than_they_must() -> None:
    rows = np.zeros((5, 64), np.float32)
    rows[0] = np.linspace(0.1, 1, 64)
    rows[1] = -rows[0]
    rows[2, 7] = 3.0
    rows[3, ::2] = -0.5
    rows[4] = 0.25
    back = read(two_bits.quantize(rows, None), rows.shape)
    np.testing.assert_array_equal(back[2:], rows[2:])
    np.testing.assert_array_equal(back[0], -back[1])
    assert float(((back[0] - rows[0]) ** 2).mean()) < 0.02


def test_threads_and_chunks_change_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 576, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(576, generator=torch.Generator().manual_seed(3))
    whole = ggml.quantize(weight, "q2_0", importance, threads=1)
    monkeypatch.setattr(ggml, "_CHUNK_WEIGHTS", 5 * 576)
    assert np.array_equal(ggml.quantize(weight, "q2_0", importance, threads=3), whole)


# Which runtimes get it.


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose rows are no multiple of 256."""
    directory = tmp_path_factory.mktemp("narrow") / "tiny"
    return Checkpoint.open(make_model(directory, hidden_size=192, intermediate_size=320))


def small(checkpoint: Checkpoint, share: float = 0.19, **changes: object) -> PlanRequest:
    budget = int(share * checkpoint.weight_bytes) + 40_000
    return PlanRequest("gguf", budget, "file", context=64, **changes)  # type: ignore[arg-type]


def test_llama_cpp_runs_it_as_planned(narrow: Checkpoint, tmp_path: Path) -> None:
    """Every layer is in it, and the runtime's logits are those of the bundle."""
    scores = make_scores(narrow.path)
    plan = plan_export(narrow, scores, small(narrow, types=("q2_0",)))
    assert {decision.type for decision in plan.tensors if "_proj" in decision.name} == {"q2_0"}
    report = export_model(narrow, scores, plan, tmp_path / "export", sizes=())
    assert report is not None
    assert report.passed
    assert report.written_bytes == report.planned_bytes <= plan.budget_bytes
    agreement = report.runtimes[0].agreement
    assert agreement is not None
    assert agreement.greedy_equal == agreement.greedy_tokens


def test_a_plan_with_it_says_which_release_reads_it(narrow: Checkpoint, tmp_path: Path) -> None:
    scores = make_scores(narrow.path)
    plan = plan_export(narrow, scores, small(narrow, types=("q8_0", "q2_0")))
    assert "q2_0" in {decision.type for decision in plan.tensors}
    assert plan.runtime_release == "b10015"
    assert any(note.startswith("q2_0 needs llama.cpp b10015 or later") for note in plan.notes)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    other = plan_export(narrow, scores, PlanRequest("gguf", 10**9, "file", context=64, types=("q8_0",)))
    assert other.runtime_release is None
    assert "runtime_release" not in json.loads(dumps_plan(other))
    assert not any("or later" in note for note in other.notes)


def test_a_plan_with_it_says_what_older_types_would_lose(narrow: Checkpoint) -> None:
    scores = make_scores(narrow.path)
    for share, told in ((0.125, "the predicted loss is "), (0.11, "no plan fits in types that older releases")):
        plan = plan_export(narrow, scores, small(narrow, share))
        assert plan.runtime_release == "b10015"
        (note,) = (note for note in plan.notes if "older releases than b10015 read" in note)
        assert told in note
        if share == 0.125:
            other = plan_export(narrow, scores, small(narrow, share, options={"runtime_version": "b10014"}))
            assert f"{other.predicted_loss:.4f} nats per token, not {plan.predicted_loss:.4f}" in note
            assert plan.predicted_loss < other.predicted_loss


def test_what_older_types_do_as_well_is_planned_in_them(narrow: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that fewer programs read has to be better by more than nothing."""
    scores, request = make_scores(narrow.path), small(narrow, 0.125)
    newer = plan_export(narrow, scores, request)
    monkeypatch.setattr(planner, "_AS_GOOD", 1.5)
    older = plan_export(narrow, scores, request)
    assert (newer.runtime_release, older.runtime_release) == ("b10015", None)
    assert newer.predicted_loss < older.predicted_loss <= 1.5 * newer.predicted_loss
    assert older.certificate.lower_bound == newer.certificate.lower_bound
    assert older.planned_bytes <= request.budget_bytes  # type: ignore[operator]
    assert not any("b10015" in note for note in older.notes)


@pytest.mark.parametrize(("release", "known"), [("b10015", True), ("10500", True), ("b10014", False), ("9000", False)])
def test_older_runtimes_never_get_it(release: str, known: bool, narrow: Checkpoint) -> None:
    chosen = {"runtime_version": options._release(release)}
    space = resolve(small(narrow, options=chosen), narrow).space
    assert ("q2_0" in {each.name for each in space.allowed.of_row(192)}) == known
    named = small(narrow, options=chosen, types=("q2_0",))
    if known:
        assert resolve(named, narrow).space.types[0].name == "q2_0"
    else:
        told = rf"q2_0 is not exported: .* from b10015 on, and --runtime-version is {chosen['runtime_version']}\. Use: "
        with pytest.raises(UnsupportedError, match=told):
            resolve(named, narrow)


def test_who_has_too_little_for_older_types_is_told_what_keeps_it_out(narrow: Checkpoint) -> None:
    request = small(narrow, 0.11, options={"runtime_version": "b9500"})
    with pytest.raises(InfeasibleBudgetError, match=r"These settings fit:\n  without --runtime-version +\S") as told:
        plan_export(narrow, make_scores(narrow.path), request)
    change = told.value.alternatives[0]
    assert change["change"] == "without --runtime-version"
    assert change["floor_bytes"] <= (request.budget_bytes or 0) < told.value.smallest_feasible_bytes


def test_without_ggml_it_stays_out(narrow: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "load_library", lambda: None)
    assert "q2_0" not in {each.name for each in resolve(small(narrow), narrow).space.allowed.of_row(192)}
    with pytest.raises(UnsupportedError, match=r"no ggml that reads it is here; pip install 'acip-export\[gguf\]'"):
        resolve(small(narrow, types=("q2_0",)), narrow)


@pytest.mark.parametrize("text", ["", "new", "b", "1.2", "b-3", "b10015-cuda", "\u0661"])
def test_what_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no release of llama\.cpp; they are called  b10015"):
        options._release(text)


def test_a_release_in_the_api_is_checked_too(narrow: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"is no release of llama\.cpp"):
        resolve(small(narrow, options={"runtime_version": "latest"}), narrow)
    with pytest.raises(UnsupportedError, match=r"onnx exports have no --runtime-version"):
        resolve(PlanRequest("onnx", 10**9, "file", options={"runtime_version": "b9500"}), narrow)


def test_who_names_a_release_is_told_nothing_of_it(narrow: Checkpoint) -> None:
    scores, known = make_scores(narrow.path), {"runtime_version": "b10500"}
    plan = plan_export(narrow, scores, small(narrow, 0.125, options=known))
    assert plan.runtime_release == "b10015"
    assert not any("b10015" in note for note in plan.notes)


def test_a_plan_that_contradicts_its_types_is_refused(narrow: Checkpoint, tmp_path: Path) -> None:
    plan = plan_export(narrow, make_scores(narrow.path), small(narrow, 0.125))
    for release in ("b1", None):
        save_plan(dataclasses.replace(plan, runtime_release=release), tmp_path / "plan.json", force=True)
        with pytest.raises(PlanFileError, match=rf"\$\.runtime_release: {release}, and its types need b10015"):
            load_plan(tmp_path / "plan.json")


def test_with_a_least_speed_types_that_nobody_timed_stay_out(narrow: Checkpoint) -> None:
    """As in tables of speeds from before it: a plan with it would have no speed at all."""
    timed = RuntimeSpeed("1", {"q8_0": (MatrixSpeed(10**6, 1e9, 1e9),)}, 0, (LayerSpeed(1, 0),), 0, 1e9, 1e9, 1)
    request = small(narrow, speeds={"llama.cpp": timed}, min_speed=0.1)
    assert "q2_0" in {each.name for each in resolve(small(narrow), narrow).space.allowed.of_row(192)}
    assert "q2_0" not in {each.name for each in resolve(request, narrow).space.allowed.of_row(192)}


def test_releases_are_compared_by_their_numbers() -> None:
    assert is_older("b999", "b1000")
    assert not is_older("b1000", "b1000")
    assert is_older("1.9.0", "1.10")
    assert first_release(GGML) == "b10015"
    assert first_release([row for row in GGML if not row.since]) is None


def test_importance_moves_the_error() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    importance = torch.ones(128)
    importance[:16] = 100
    plain, weighted = (round_trip(weight, "q2_0", InputMoments(each)) for each in (None, importance))
    error = [float((back - weight)[:, :16].square().sum()) for back in (plain, weighted)]
    assert error[1] < 0.9 * error[0]
