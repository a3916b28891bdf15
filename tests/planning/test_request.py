"""What a request means for a model, resolved once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from acip_export.artifacts.plan import Serving
from acip_export.errors import UnsupportedError, UsageError
from acip_export.formats.protocol import AUTO
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, PlanRequest, Problem, ServingRule, resolve, sweep
from acip_export.planning.capacity_search import Solution
from acip_export.planning.certificate import low_rank_note
from acip_export.planning.memory import ModelMemory
from tests.encoders import make_encoder
from tests.planning.problems import with_overhead
from tests.support import make_model, make_scores


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_model(tmp_path_factory.mktemp("requests") / "tiny"))


def test_defaults_are_filled_in(checkpoint: Checkpoint) -> None:
    question = resolve(PlanRequest("gguf", 10**6, "file"), checkpoint)
    assert question.budget == Budget(10**6, "file")
    assert question.rule == ServingRule(checkpoint.shape.max_context, "f16", "cpu", cache_type_v="f16")
    assert question.space.layout.name == "stock"
    assert question.space.types == question.space.default_types


def test_one_space_for_each_layout(checkpoint: Checkpoint) -> None:
    question = resolve(PlanRequest("gguf", layout=AUTO), checkpoint)
    assert [space.layout.name for space in question.spaces] == ["stock", "lora"]
    with pytest.raises(UsageError, match="one plan is for one layout: stock, lora"):
        _ = question.space


def test_a_question_about_all_budgets_has_none(checkpoint: Checkpoint) -> None:
    question = resolve(PlanRequest("onnx", budget_scope="process"), checkpoint)
    assert question.scope == "process"
    with pytest.raises(UsageError, match="no budget"):
        _ = question.budget


@pytest.mark.parametrize("option", ["imatrix", "base_gguf"])
def test_options_of_another_format_are_refused(checkpoint: Checkpoint, option: str) -> None:
    with pytest.raises(UnsupportedError, match=f"onnx exports have no --{option.replace('_', '-')}"):
        resolve(PlanRequest("onnx", options={option: "x"}), checkpoint)


def test_the_prompt_batch_suits_the_budget(checkpoint: Checkpoint) -> None:
    question = resolve(PlanRequest("gguf", context=200), checkpoint)
    memory = ModelMemory.of(question.space.format, checkpoint)

    def batch(budget: Budget, rule: ServingRule = question.rule) -> int:
        return rule.serving(budget, memory).prompt_batch

    assert batch(Budget(1)) == 8
    assert batch(Budget(10**9)) == 200
    assert batch(Budget(10**7)) == batch(Budget(10**7 + memory.base.total, "process"))
    assert 8 < batch(Budget(10**7)) < 200
    assert batch(Budget(1, "file")) == 200
    assert batch(Budget(1), replace(question.rule, prompt_batch=64)) == 64
    assert batch(Budget(1), replace(question.rule, whole_prompts=True)) == 200


def test_encoders_read_whole_texts(tmp_path: Path) -> None:
    encoder = Checkpoint.open(make_encoder(tmp_path / "bert"))
    question = resolve(PlanRequest("onnx", context=32), encoder)
    memory = ModelMemory.of(question.space.format, encoder)
    assert question.rule.serving(Budget(1), memory) == Serving(32, "f32", 32)
    with pytest.raises(UsageError, match="--prompt-batch 16 is less than a text of --context 32"):
        resolve(PlanRequest("onnx", context=32, prompt_batch=16), encoder)


def test_a_sweep_makes_room_for_whole_prompts(checkpoint: Checkpoint) -> None:
    """Where a runtime computes them in one piece, the curve is of that batch, as a plan is."""
    scores = make_scores(checkpoint.path)
    floors = {}
    for whole in (False, True):
        question = resolve(PlanRequest("onnx", whole_prompts=whole, context=200), checkpoint)
        problem = Problem.of(checkpoint, scores, with_overhead(question.space))
        line = sweep(problem, [question.rule], "memory", "onnx", steps=2)
        floors[whole] = line.points[0].used_bytes
    serving = Serving(200, "f32", 32)
    assert floors[False] == problem.floor("memory", serving).nbytes
    assert floors[True] == problem.floor("memory", replace(serving, prompt_batch=200)).nbytes


def test_candidates_are_for_one_backend(checkpoint: Checkpoint) -> None:
    space = resolve(PlanRequest("onnx"), checkpoint).space
    problem = Problem.of(checkpoint, make_scores(checkpoint.path), with_overhead(space))
    with pytest.raises(ValueError, match="for cpu, not webgpu"):
        problem.floor("file", Serving(64, "f16", 8, "webgpu"))


def test_a_rougher_plan_claims_nothing_about_quantization_alone(checkpoint: Checkpoint) -> None:
    space = resolve(PlanRequest("onnx", types=("int8",)), checkpoint).space
    problem = Problem.of(checkpoint, make_scores(checkpoint.path), with_overhead(space))
    serving = Serving(64, "f32", 8)
    exact, rough = (problem.plan(Budget(900_000, "file"), serving, exact=exact) for exact in (True, False))
    assert "low rank; quantization alone does not fit" in exact.notes[0]
    assert rough.notes[0].endswith("layers are low rank")


def test_low_rank_that_gains_next_to_nothing_is_not_worth_a_word(checkpoint: Checkpoint) -> None:
    space = resolve(PlanRequest("onnx", types=("int8",)), checkpoint).space
    problem = Problem.of(checkpoint, make_scores(checkpoint.path), with_overhead(space))
    plan = problem.plan(Budget(900_000, "file"), Serving(64, "f32", 8))
    solution = cast("Solution", SimpleNamespace(decisions=plan.tensors))
    notes = [
        low_rank_note(solution, replace(plan.certificate, quantization_only_loss=alone), 1.0, "nats", compared=True)
        for alone in (1.0, 1.009, 1.2)
    ]
    assert notes[:2] == [None, None]
    assert (notes[2] or "").endswith("predicted loss 1 instead of 1.2 nats")


def test_a_plan_says_what_it_chose_from(checkpoint: Checkpoint) -> None:
    for types in ((), ("int8", "int4")):
        space = resolve(PlanRequest("onnx", types=types), checkpoint).space
        problem = Problem.of(checkpoint, make_scores(checkpoint.path), with_overhead(space))
        assert set(problem.plan(Budget(1_500_000, "file"), Serving(64, "f32", 8)).types) == set(types)
