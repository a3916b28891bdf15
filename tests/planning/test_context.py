"""The longest context that fits, and what every doubling of it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import UnacceptedLossError, UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import DoesNotFit, PlanRequest, make_plan, resolve
from acip_export.planning.problem import Problem
from acip_export.units import parse_context
from tests.planning.problems import with_overhead
from tests.support import make_model, make_scores

LONGEST = 5000
STEP = 256


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ScoreFile]:
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=LONGEST)
    return Checkpoint.open(model), make_scores(model)


def problem_of(ranked: tuple[Checkpoint, ScoreFile], request: PlanRequest) -> Problem:
    return Problem.of(*ranked, with_overhead(resolve(request, ranked[0]).space))


@pytest.mark.parametrize("format", ["gguf", "onnx"])
@pytest.mark.parametrize("prompt_batch", [16, None])
@pytest.mark.parametrize("max_loss", [None, 0.5])
def test_no_longer_context_would_do(
    ranked: tuple[Checkpoint, ScoreFile], format: str, prompt_batch: int | None, max_loss: float | None
) -> None:
    """At every budget: what was found keeps what was asked for, and none of the longer ones does, tried one by one."""
    request = PlanRequest(format, context="max", max_loss=max_loss, prompt_batch=prompt_batch)
    problem = problem_of(ranked, request)
    least = replace(request, budget_bytes=10**7, context=STEP, max_loss=None)
    question = resolve(least, ranked[0])
    floor = problem.floor("memory", question.rule.serving(question.budget, problem.memory)).nbytes
    found = []
    for more in (40_000, 400_000, 3_000_000, 100_000_000):
        question = resolve(replace(request, budget_bytes=floor + more), ranked[0])
        shortest = problem.plan(
            question.budget, replace(question.rule, context=STEP).serving(question.budget, problem.memory)
        )
        most = shortest.predicted_loss + 0.01 if max_loss is None else max_loss
        try:
            plan = make_plan(problem, question.budget, question.rule)
        except UnacceptedLossError as refused:
            assert shortest.predicted_loss > most
            assert "--max-loss" in str(refused)
            continue
        found.append(plan.serving.context)
        assert plan.used_bytes <= question.nbytes
        assert plan.predicted_loss <= most
        for context in [*range(plan.serving.context + STEP, LONGEST, STEP), LONGEST]:
            if context <= plan.serving.context:
                continue
            rule = resolve(replace(request, budget_bytes=floor + more, context=context, max_loss=None), ranked[0]).rule
            try:
                longer = problem.plan(question.budget, rule.serving(question.budget, problem.memory))
            except DoesNotFit:
                continue
            assert longer.predicted_loss > most
    assert found == sorted(found) and found[-1] == LONGEST and found[0] < LONGEST


def test_what_doublings_cost(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    question = resolve(PlanRequest("gguf", 2_000_000, context=1024, prompt_batch=16), ranked[0])
    problem = problem_of(ranked, PlanRequest("gguf"))
    plan = make_plan(problem, question.budget, question.rule)
    costs = plan.certificate.contexts
    assert [cost.context for cost in costs] == [512, 1024, 2048, 4096]
    own = costs[1]
    assert (own.kv_cache, own.predicted_loss) == (plan.breakdown["kv_cache"], plan.predicted_loss)
    assert [cost.kv_cache for cost in costs] == [own.kv_cache * factor // 2 for factor in (1, 2, 4, 8)]
    assert costs[0].predicted_loss is not None and costs[0].predicted_loss < plan.predicted_loss
    assert costs[-1].predicted_loss is None  # its cache alone is larger
    files = make_plan(problem, resolve(PlanRequest("gguf", 2_000_000, "file"), ranked[0]).budget, question.rule)
    assert files.certificate.contexts == ()


def test_a_budget_below_the_shortest_context_names_what_that_needs(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    question = resolve(PlanRequest("gguf", 100_000, context="max"), ranked[0])
    problem = problem_of(ranked, PlanRequest("gguf"))
    with pytest.raises(DoesNotFit) as refused:
        make_plan(problem, question.budget, question.rule)
    serving = replace(question.rule, context=STEP).serving(question.budget, problem.memory)
    assert refused.value.floor == problem.floor("memory", serving)


def test_contexts_as_people_write_them() -> None:
    assert [parse_context(text) for text in ("8192", "8k", "32K", "max", "MAX")] == [8192, 8192, 32768, "max", "max"]
    for text in ("", "k", "8kB", "1.5k", "most"):
        with pytest.raises(UsageError, match="write for example 8192, 8k or max"):
            parse_context(text)


def test_a_largest_loss_is_of_the_longest_context(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    for request in (PlanRequest("gguf", max_loss=0.1), PlanRequest("gguf", context="max", max_loss=-1.0)):
        with pytest.raises(UsageError, match="--context max"):
            resolve(request, ranked[0])
