from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acip_export.artifacts.plan import (
    RUNTIME_PARTS,
    Plan,
    decision_bytes,
    decode_plan,
    dumps_plan,
    load_plan,
    save_plan,
)
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import ScoreFileError, UnsupportedError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import DoesNotFit, PlanRequest, Problem, infeasible, make_plan, resolve
from acip_export.units import parse_bytes
from tests.encoders import make_encoder
from tests.planning.problems import overhead, planned, with_overhead
from tests.support import make_model, make_scores


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ScoreFile]:
    model = make_model(tmp_path_factory.mktemp("models") / "tiny")
    return Checkpoint.open(model), make_scores(model, adapters=True)


REQUESTS = [
    PlanRequest("gguf"),
    PlanRequest("gguf", layout="lora", types=("q8_0",)),
    PlanRequest("gguf", types=("q4_k", "q6_k"), cache_type="q8_0"),
    PlanRequest("onnx"),
    PlanRequest("onnx", types=("int8",), budget_scope="file"),
    PlanRequest("onnx", types=("f32",)),
    PlanRequest("onnx", budget_scope="process"),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(REQUESTS), st.integers(300_000, 9_000_000), st.integers(1, 256), st.integers(0, 200_000))
def test_never_above_budget_and_monotone(
    ranked: tuple[Checkpoint, ScoreFile], request_: PlanRequest, budget: int, context: int, more: int
) -> None:
    asked = replace(request_, budget_bytes=budget, context=context, prompt_batch=16)
    try:
        plan = planned(*ranked, asked)
    except DoesNotFit as refused:
        assert refused.floor.nbytes > budget
        smallest = planned(*ranked, replace(asked, budget_bytes=refused.floor.nbytes))
        assert smallest.certificate.bytes_left == 0
        return
    used = plan.used_bytes
    assert used <= budget
    assert plan.certificate.bytes_left == budget - used
    assert plan.planned_bytes == sum(overhead(plan.tensors).values())
    assert all(d.nbytes == decision_bytes(d, plan.format) for d in plan.tensors)
    assert [d.name for d in plan.tensors] == list(ranked[0].tensors)
    larger = planned(*ranked, replace(asked, budget_bytes=budget + more))
    assert larger.predicted_loss <= plan.predicted_loss
    # What plan.json holds is the plan.
    assert decode_plan(dumps_plan(plan).encode(), "here") == plan


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_process_budget_pays_for_the_runtime_first(ranked: tuple[Checkpoint, ScoreFile], target: str) -> None:
    """The same plan as for the memory alone, out of a budget that is larger by the runtime's own parts."""
    memory = planned(*ranked, PlanRequest(target, 2_000_000, context=64))
    base = sum(memory.breakdown[part] for part in RUNTIME_PARTS)
    assert memory.process_bytes == memory.memory_bytes + base
    process = planned(*ranked, PlanRequest(target, 2_000_000 + base, "process", context=64))
    assert process.tensors == memory.tensors
    assert process.serving == memory.serving
    # What other settings would give is listed where they take a noteworthy share of the budget, which differs.
    assert replace(process.certificate, alternatives=()) == replace(memory.certificate, alternatives=())
    assert process.used_bytes == process.process_bytes <= process.budget_bytes
    with pytest.raises(DoesNotFit) as caught:
        planned(*ranked, PlanRequest(target, base, "process", context=64))
    assert caught.value.floor.nbytes > base
    assert caught.value.floor.parts["runtime and its tokenizer"] == base


def test_kept_units_are_a_prefix_of_the_modules_order(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    plan = planned(*ranked, PlanRequest("onnx", 900_000, "file", types=("int8",)))
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
    assert not planned(checkpoint, helped, coarse).adapters
    cut = planned(checkpoint, helped, PlanRequest("onnx", 900_000, "file", types=("int8",)))
    assert any(d.kept for d in cut.tensors)
    assert cut.adapters


def test_the_divergence_is_predicted_beside_the_loss_that_plans_are_chosen_by(
    ranked: tuple[Checkpoint, ScoreFile],
) -> None:
    """The same plan, whatever the divergences; they count where components drop, as far as they do."""
    checkpoint, scores = ranked
    request = PlanRequest("onnx", 900_000, "file", types=("int8",))
    unknown = planned(checkpoint, scores, request)
    assert unknown.predicted_divergence is None
    dense = scores.curve[0].loss
    parted = replace(scores, curve=tuple(replace(p, divergence=2 * (p.loss - dense)) for p in scores.curve))
    found = planned(checkpoint, parted, request)
    assert replace(found, predicted_divergence=None) == unknown
    assert found.predicted_divergence is not None
    assert found.predicted_loss < found.predicted_divergence < 2 * found.predicted_loss
    alone = planned(checkpoint, parted, PlanRequest("gguf", 2_000_000, types=("q8_0",)))
    assert alone.predicted_divergence == alone.predicted_loss

    # Adapters that help have a divergence of their own.
    def adapted(share: float) -> float:
        curve = [replace(p, loss_with_adapters=p.loss - 1e-3, divergence_with_adapters=share) for p in parted.curve]
        plan = planned(checkpoint, replace(parted, curve=tuple(curve)), request)
        assert plan.predicted_divergence is not None
        return plan.predicted_divergence

    assert adapted(0.1) < adapted(0.3)


def test_the_same_question_has_the_same_answer(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    request = PlanRequest("gguf", 2_000_000)
    assert planned(*ranked, request) == planned(*ranked, request)


def test_low_rank_that_does_not_pay_is_said(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    plan = planned(*ranked, PlanRequest("onnx", 10_000_000, "file"))
    assert not any(d.rank for d in plan.tensors)
    assert "does not pay" in plan.notes[0]


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (PlanRequest("gguf"), UsageError, "no budget"),
        (PlanRequest("gguf", 9_000_000, context=100_000), UsageError, "1 to 256"),
        (PlanRequest("gguf", 9_000_000, context=-1), UsageError, "1 to 256"),
        (PlanRequest("onnx", 9_000_000, cache_type="q8_0"), UnsupportedError, "no KV cache type"),
        (
            PlanRequest("gguf", 9_000_000, cache_type_v="q2_k"),
            UnsupportedError,
            "no KV cache type 'q2_k'; it has: f16, bf16.*, auto",
        ),
        (
            PlanRequest("gguf", 9_000_000, cache_type="q8_0", cache_type_k="f16"),
            UsageError,
            "leave it out, or  --cache",
        ),
        (
            PlanRequest("onnx", 9_000_000, backend="webgpu", cache_type_k="f16", cache_type_v="f32"),
            UnsupportedError,
            "no KV cache type 'f32'",
        ),
    ],
)
def test_refusals(
    ranked: tuple[Checkpoint, ScoreFile], request_: PlanRequest, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        planned(*ranked, request_)


def test_an_encoder_that_fits_with_shorter_texts(tmp_path: Path) -> None:
    """It has no cache and no prompt batch of its own; what it computes grows with its texts."""
    encoder = Checkpoint.open(make_encoder(tmp_path / "bert", max_position_embeddings=256))
    question = resolve(PlanRequest("onnx", 1, context=128), encoder)
    problem = Problem.of(encoder, make_scores(encoder.path), question.space)
    with pytest.raises(DoesNotFit) as refused:
        make_plan(problem, question.budget, question.rule)
    floor = refused.value.floor
    told = str(infeasible(problem, question.budget, question.rule, floor))
    assert "It does not fit with a shorter context, the types that" in told and "cache" not in told
    budget = replace(question.budget, nbytes=floor.nbytes - 1)
    assert "--context 64 " in str(infeasible(problem, budget, question.rule, floor))
    of_files = str(infeasible(problem, replace(question.budget, scope="file"), question.rule, floor))
    assert "It does not fit with the types that" in of_files


def test_a_refused_budget_is_explained(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    """By the floor and its parts, and by what would fit."""
    request = PlanRequest("gguf", 400_000, types=("q8_0",), context=256, prompt_batch=64)
    question = resolve(request, ranked[0])
    problem = Problem.of(*ranked, with_overhead(question.space))
    with pytest.raises(DoesNotFit) as refused:
        make_plan(problem, question.budget, question.rule)
    error = infeasible(problem, question.budget, question.rule, refused.value.floor)
    assert error.smallest_feasible_bytes == refused.value.floor.nbytes == sum(refused.value.floor.parts.values())
    assert "no plan fits 400 kB (400,000 bytes)" in str(error)
    floor = refused.value.floor.nbytes
    assert f" ({floor:,} bytes), most of it" in str(error)
    advice, typed = str(error).splitlines()[-3:-1]
    assert advice.startswith(
        "It does not fit with a shorter context, a smaller KV cache or prompt batch, the types that"
    )
    assert advice.endswith(" a larger budget does:") and parse_bytes(typed.split()[1]) >= floor
    roomier = replace(question.budget, nbytes=refused.value.floor.nbytes - 1)
    flags = ("--types f16,", "--cache-type q8_0", "--prompt-batch 8")
    assert all(flag in str(infeasible(problem, roomier, question.rule, refused.value.floor)) for flag in flags)


def test_rows_that_fit_no_block_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "odd", hidden_size=160, intermediate_size=320, head_dim=40, num_hidden_layers=1)
    with pytest.raises(UnsupportedError, match="rows of 160 weights fit none"):
        planned(Checkpoint.open(model), make_scores(model), PlanRequest("gguf", 9_000_000, types=("q4_k",)))


def test_scores_of_another_model(ranked: tuple[Checkpoint, ScoreFile], tmp_path: Path) -> None:
    other = Checkpoint.open(make_model(tmp_path / "other", seed=7))
    with pytest.raises(ScoreFileError, match="was made for"):
        planned(other, ranked[1], PlanRequest("gguf", 9_000_000))


@pytest.fixture
def saved(ranked: tuple[Checkpoint, ScoreFile], tmp_path: Path) -> tuple[Plan, Path]:
    plan = planned(*ranked, PlanRequest("onnx", 900_000, "file", types=("int8",)))
    save_plan(plan, tmp_path / "plan.json")
    return plan, tmp_path / "plan.json"


def test_plan_file_round_trip(saved: tuple[Plan, Path]) -> None:
    plan, file = saved
    assert load_plan(file) == plan
    described = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert [part for part in plan.breakdown if f"`{part}`" not in described] == []


def test_a_plan_is_read_only(saved: tuple[Plan, Path]) -> None:
    for plan in (saved[0], load_plan(saved[1])):
        for mapping in (plan.files, plan.breakdown, plan.options):
            with pytest.raises(TypeError):
                mapping["more"] = 1  # type: ignore[index]
