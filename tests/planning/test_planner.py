from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_export.artifacts.plan import (
    RUNTIME_PARTS,
    Plan,
    Serving,
    TensorDecision,
    decision_bytes,
    decode_plan,
    dumps_plan,
    load_plan,
    save_plan,
)
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import InfeasibleBudgetError, PlanFileError, ScoreFileError, UnsupportedError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, make_plan
from tests.support import make_model, make_scores


def overhead(decisions: tuple[TensorDecision, ...], _serving: Serving) -> dict[str, int]:
    """File bytes that, as in the real formats, depend a little on what was decided."""
    around = sum(64 + len(str(d.nbytes)) + (40 if d.rank else 0) for d in decisions)
    return {"model": sum(d.nbytes for d in decisions) + around, "config": 777}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ScoreFile]:
    model = make_model(tmp_path_factory.mktemp("models") / "tiny")
    return Checkpoint.open(model), make_scores(model, adapters=True)


REQUESTS = [
    PlanRequest("gguf", 0),
    PlanRequest("gguf", 0, layout="lora", types=("q8_0",)),
    PlanRequest("gguf", 0, types=("q4_k", "q6_k"), cache_type="q8_0"),
    PlanRequest("onnx", 0),
    PlanRequest("onnx", 0, types=("int8",), budget_scope="file"),
    PlanRequest("onnx", 0, types=("f32",)),
    PlanRequest("onnx", 0, budget_scope="process"),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(REQUESTS), st.integers(300_000, 9_000_000), st.integers(1, 256), st.integers(0, 200_000))
def test_never_above_budget_and_monotone(
    ranked: tuple[Checkpoint, ScoreFile], request_: PlanRequest, budget: int, context: int, more: int
) -> None:
    asked = replace(request_, budget_bytes=budget, context=context, prompt_batch=16)
    try:
        plan = make_plan(*ranked, asked, overhead)
    except InfeasibleBudgetError as error:
        assert error.smallest_feasible_bytes > budget
        smallest = make_plan(*ranked, replace(asked, budget_bytes=error.smallest_feasible_bytes), overhead)
        assert smallest.certificate.bytes_left == 0
        return
    used = plan.used_bytes
    assert used <= budget
    assert plan.certificate.bytes_left == budget - used
    assert plan.planned_bytes == sum(overhead(plan.tensors, plan.serving).values())
    assert all(d.nbytes == decision_bytes(d, plan.format) for d in plan.tensors)
    assert [d.name for d in plan.tensors] == list(ranked[0].tensors)
    larger = make_plan(*ranked, replace(asked, budget_bytes=budget + more), overhead)
    assert larger.predicted_loss <= plan.predicted_loss
    # What plan.json holds is the plan.
    assert decode_plan(dumps_plan(plan).encode(), "here") == plan


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_process_budget_pays_for_the_runtime_first(ranked: tuple[Checkpoint, ScoreFile], target: str) -> None:
    """The same plan as for the memory alone, out of a budget that is larger by the runtime's own parts."""
    memory = make_plan(*ranked, PlanRequest(target, 2_000_000, context=64), overhead)
    base = sum(memory.breakdown[part] for part in RUNTIME_PARTS)
    assert memory.process_bytes == memory.memory_bytes + base
    process = make_plan(*ranked, PlanRequest(target, 2_000_000 + base, "process", context=64), overhead)
    assert process.tensors == memory.tensors
    assert process.serving == memory.serving
    # What other settings would give is listed where they take a noteworthy share of the budget, which differs.
    assert replace(process.certificate, alternatives=()) == replace(memory.certificate, alternatives=())
    assert process.used_bytes == process.process_bytes <= process.budget_bytes
    with pytest.raises(InfeasibleBudgetError, match="runtime and its tokenizer") as caught:
        make_plan(*ranked, PlanRequest(target, base, "process", context=64), overhead)
    assert caught.value.smallest_feasible_bytes > base


def test_kept_units_are_a_prefix_of_the_modules_order(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    plan = make_plan(*ranked, PlanRequest("onnx", 900_000, "file", types=("int8",)), overhead)
    factored = [d for d in plan.tensors if d.rank is not None]
    assert factored
    for decision in factored:
        assert decision.kept is not None
        kept = {unit for start, stop in decision.kept for unit in range(start, stop)}
        assert kept == set(ranked[1].modules[decision.module].order[: decision.rank].tolist())


def test_adapters_make_up_for_dropped_components_only(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    checkpoint, scores = ranked
    helped = replace(scores, curve=tuple(replace(p, loss_with_adapters=p.loss - 0.01) for p in scores.curve))
    coarse = PlanRequest("gguf", 700_000, "file", types=("q2_k",))
    assert not make_plan(checkpoint, helped, coarse, overhead).adapters
    cut = make_plan(checkpoint, helped, PlanRequest("onnx", 900_000, "file", types=("int8",)), overhead)
    assert any(d.kept for d in cut.tensors)
    assert cut.adapters


def test_the_same_question_has_the_same_answer(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    request = PlanRequest("gguf", 2_000_000)
    assert make_plan(*ranked, request, overhead) == make_plan(*ranked, request, overhead)


def test_low_rank_that_does_not_pay_is_said(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    plan = make_plan(*ranked, PlanRequest("onnx", 10_000_000, "file"), overhead)
    assert not any(d.rank for d in plan.tensors)
    assert "does not pay" in plan.notes[0]


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (PlanRequest("gguf", 10_000), InfeasibleBudgetError, "smallest feasible budget is"),
        (PlanRequest("gguf", 9_000_000, types=("int4",)), UnsupportedError, "no type 'int4'"),
        (PlanRequest("gguf", 9_000_000, layout="spiral"), UnsupportedError, "no layout"),
        (PlanRequest("coreml", 9_000_000), UnsupportedError, "unknown format"),
        (PlanRequest("gguf", 9_000_000, context=100_000), UsageError, "1 to 256"),
        (PlanRequest("gguf", 9_000_000, context=-1), UsageError, "1 to 256"),
        (PlanRequest("onnx", 9_000_000, cache_type="q8_0"), UsageError, "no KV cache type"),
    ],
)
def test_refusals(
    ranked: tuple[Checkpoint, ScoreFile], request_: PlanRequest, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make_plan(*ranked, request_, overhead)


def test_rows_that_fit_no_block_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "odd", hidden_size=160, intermediate_size=320, head_dim=40, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="rows of 160 weights fit none"):
        make_plan(Checkpoint.open(model), make_scores(model), PlanRequest("gguf", 9_000_000, types=("q4_k",)), overhead)


def test_scores_of_another_model(ranked: tuple[Checkpoint, ScoreFile], tmp_path: Path) -> None:
    other = Checkpoint.open(make_model(tmp_path / "other", seed=7))
    with pytest.raises(ScoreFileError, match="was made for"):
        make_plan(other, ranked[1], PlanRequest("gguf", 9_000_000), overhead)


@pytest.fixture
def saved(ranked: tuple[Checkpoint, ScoreFile], tmp_path: Path) -> tuple[Plan, Path]:
    plan = make_plan(*ranked, PlanRequest("onnx", 900_000, "file", types=("int8",)), overhead)
    save_plan(plan, tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def test_plan_file_round_trip(saved: tuple[Plan, Path]) -> None:
    plan, file = saved
    assert load_plan(file) == plan


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"artifact": "acip-plan"', '"type": "plan"', "not a plan"),
        ('"version": 2', '"version": 3', "version 3"),
        ('"nbytes": ', '"nbytes": 1', "its decision takes"),
        ('"planned_bytes": ', '"planned_bytes": 1', "add up to"),
        ('"budget_bytes": 900000', '"budget_bytes": 9', "of a budget of 9"),
        ('"layout"', '"goal"', "missing required field layout"),
        ('"int8"', '"int9"', "onnx has no type 'int9'"),
        ('"rank": ', '"rank": 1', "its rank is"),
        ('"representation": "factored"', '"representation": "folded"', "invalid enum value 'folded'"),
        ('"tensors"', "tensors", "is no JSON"),
    ],
)
def test_edited_plans(saved: tuple[Plan, Path], old: str, new: str, says: str) -> None:
    _, file = saved
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanFileError, match=says):
        load_plan(file)
