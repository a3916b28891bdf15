"""Several plans are run on held-out text before one is chosen: the one that measured best is shipped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import acip_export
from acip_export.api import candidates as comparing
from acip_export.artifacts.plan import load_plan, save_plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, PlanRequest, Problem, make_plan, resolve, variations
from acip_export.progress import Progress

BUDGET = 900_000
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def scores(model: Path, text: Path) -> ScoreFile:
    acip_export.rank(model, text, out=model / "m.acip", algorithm="fisher", context=32)
    return acip_export.load_scores(model / "m.acip")


@pytest.fixture(scope="module")
def problem(scores: ScoreFile) -> Problem:
    assert scores.file is not None
    checkpoint = Checkpoint.open(scores.file.parent)
    request = PlanRequest("gguf", types=("q8_0", "q6_k", "q4_0", "q3_k"), rounding="feedback")
    return Problem.of(checkpoint, scores, resolve(request, checkpoint).space)


def best(problem: Problem) -> acip_export.Plan:
    rule = resolve(PlanRequest("gguf", BUDGET, "file", context=64), problem.checkpoint).rule
    return make_plan(problem, Budget(BUDGET, "file"), rule)


def test_variations_differ_fit_and_predict_as_the_problem_does(problem: Problem) -> None:
    plan = best(problem)
    others = dict(variations(problem, Budget(BUDGET, "file"), plan))
    assert len(others) >= 3 and any(change.startswith("model.embed_tokens ") for change in others)
    assert len({plan.tensors, *(other.tensors for other in others.values())}) == 1 + len(others)
    losses = {
        (candidate.name, option.type): loss
        for candidate in problem.candidates
        for option, loss in zip(candidate.options, candidate.loss, strict=True)
    }
    for change, other in others.items():
        assert other.used_bytes <= BUDGET and other.certificate.bytes_left == BUDGET - other.used_bytes
        assert other.predicted_loss >= plan.certificate.lower_bound
        summed = sum(losses[decision.name, decision.type] for decision in other.tensors)
        assert other.predicted_loss == pytest.approx(summed)
        if change.startswith("model.embed_tokens "):
            (embedding,) = (decision for decision in other.tensors if decision.name == EMBEDDING)
            assert change == f"model.embed_tokens {embedding.type}"


def test_the_best_measured_is_shipped(scores: ScoreFile, tmp_path: Path) -> None:
    assert scores.file is not None
    asked = {"budget": BUDGET, "format": "gguf", "scope": "file", "context": 64, "calibrate": False}
    stages = set()
    plan = acip_export.plan(
        scores.file.parent,
        scores,
        types=["q8_0", "q6_k", "q4_0", "q3_k"],
        candidates=4,
        progress=lambda step: stages.add(step.stage),
        **asked,  # type: ignore[arg-type]
    )
    assert "compare plans" in stages and len(plan.candidates) >= 3
    measured = [each.measured_loss for each in plan.candidates]
    assert all(loss is not None and loss > 0 for loss in measured)
    shipped = min(plan.candidates, key=lambda each: each.measured_loss or 0.0)
    assert plan.predicted_loss == shipped.predicted_loss and plan.used_bytes <= BUDGET
    assert plan.candidates[0].change == "predicted best"
    assert shipped.change in plan.notes[-1] and f"{shipped.measured_loss:.4f}" in plan.notes[-1]
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_plan_that_does_not_run_is_reported_and_left_out(
    problem: Problem, scores: ScoreFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = best(problem)
    # Embeddings have no importance, without which ggml has no codes of this type.
    broken = replace(
        plan,
        tensors=tuple(replace(each, type="iq2_xxs") if each.name == EMBEDDING else each for each in plan.tensors),
        predicted_loss=0.0,
    )
    monkeypatch.setattr(comparing, "variations", lambda *_: [("broken", broken)])
    chosen = comparing.measured_best(scores, problem, Budget(BUDGET, "file"), plan, 2)
    assert chosen.tensors == plan.tensors
    failed = chosen.candidates[1]
    assert failed.change == "broken" and failed.measured_loss is None and "importance" in (failed.failure or "")
    assert "broken: " in chosen.notes[-1] and chosen.notes[-1].endswith("This is the plan 'predicted best'")


def test_one_candidate_is_the_prediction_alone(scores: ScoreFile) -> None:
    assert scores.file is not None
    plan = acip_export.plan(
        scores.file.parent, scores, budget=BUDGET, format="gguf", scope="file", types=["q8_0", "q4_0"], calibrate=False
    )
    assert plan.candidates == ()


def test_it_says_when_none_can_run(problem: Problem, scores: ScoreFile) -> None:
    elsewhere = replace(scores, data=replace(scores.data, held_out=None))
    chosen = comparing.measured_best(elsewhere, problem, Budget(BUDGET, "file"), best(problem), 3)
    assert chosen.candidates == ()
    assert chosen.notes[-1] == ("no other plan was compared with it: the text that the ranking held out is not here")


@pytest.mark.usefixtures("kept_at_once")
def test_what_was_measured_is_kept(problem: Problem, scores: ScoreFile, caplog: pytest.LogCaptureFixture) -> None:
    """A killed run goes on behind the block that it was at, and no plan is measured twice."""
    assert scores.file is not None
    plan, budget = best(problem), Budget(BUDGET, "file")
    file = scores.file.with_name("m.acip.candidates-gguf.json")
    file.unlink(missing_ok=True)
    steps: list[Progress] = []

    def compare(count: int, stop: int | None = None) -> acip_export.Plan:
        steps.clear()

        def advance(step: Progress) -> None:
            steps.append(step)
            if stop is not None and step.done >= stop:
                raise KeyboardInterrupt

        return comparing.measured_best(scores, problem, budget, plan, count, advance)

    whole = compare(3)
    everything = steps[-1].total
    assert file.exists() and everything == 2 * 4
    assert compare(3) == whole and not steps
    file.unlink()
    with pytest.raises(KeyboardInterrupt):
        compare(3, stop=5)  # the second block
    assert file.with_name(f"{file.name}.run").exists()
    assert compare(3) == whole
    assert "going on behind block 1" in caplog.text and steps[0].done > 4
    assert not file.with_name(f"{file.name}.run").exists()
    # Of another text or quantizer nothing is known.
    known = json.loads(file.read_text())
    for changed in ({"text_sha256": "0"}, {"tokens": 1}, {"quantizer": "another"}, {"plans": 3}):
        file.write_text(json.dumps({**known, **changed}))
        assert compare(3) == whole and len(steps) >= 8
    # With one more plan only that is measured.
    more = compare(4)
    assert steps[-1].total == 2 * 2
    assert more.candidates[:3] == whole.candidates
