"""Which layouts a runtime runs, and how the best of several is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from acip_export.api import plan_export
from acip_export.api.plan import other_requests
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import InfeasibleBudgetError, UnsupportedError
from acip_export.formats.protocol import AUTO
from acip_export.formats.registry import export_format, export_formats
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, Problem, make_plan, resolve
from tests.support import make_model, make_scores

GGUF = export_format("gguf")


def names(layout: str | None, runtime: str | None) -> list[str]:
    return [found.name for found in GGUF.layouts_for(layout, runtime)]


def test_stock_llama_cpp_is_the_default_runtime() -> None:
    assert names(None, None) == ["stock"]
    assert names(AUTO, None) == names(AUTO, "llama.cpp") == ["stock", "lora"]
    assert names(None, "acip-llama.cpp") == ["factored"]
    assert set(names(AUTO, "acip-llama.cpp")) == {layout.name for layout in GGUF.layouts}


def test_a_named_layout_needs_no_runtime_but_no_wrong_one() -> None:
    assert names("factored", None) == ["factored"]
    with pytest.raises(UnsupportedError, match=r"llama\.cpp does not run .*'factored'.* --runtime acip-llama\.cpp"):
        names("factored", "llama.cpp")
    with pytest.raises(UnsupportedError, match=r"no runtime 'vllm'; it has: llama\.cpp, acip-llama\.cpp"):
        names(None, "vllm")


def test_every_layout_is_run_by_something_and_exists() -> None:
    for target in export_formats():
        run = {name for layouts in target.runtimes.values() for name in layouts}
        assert run == {layout.name for layout in target.layouts}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ScoreFile]:
    model = make_model(tmp_path_factory.mktemp("layouts") / "tiny", "qwen3")
    return Checkpoint.open(model), make_scores(model)


def planned(
    ranked: tuple[Checkpoint, ScoreFile],
    budget: int,
    layout: str | None,
    runtime: str | None = None,
    types: tuple[str, ...] = ("q8_0", "q4_0"),  # quick to measure
) -> Plan:
    return plan_export(*ranked, PlanRequest("gguf", budget, "file", runtime=runtime, layout=layout, types=types))


@pytest.mark.slow
def test_auto_is_the_best_predicted_of_the_runtimes_layouts(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    budget = 800_000
    apart = {name: planned(ranked, budget, name) for name in ("stock", "lora", "factored")}
    stock = min((apart["stock"], apart["lora"]), key=lambda plan: plan.predicted_loss)
    assert planned(ranked, budget, AUTO).layout == stock.layout
    extended = planned(ranked, budget, AUTO, "acip-llama.cpp")
    assert extended.predicted_loss == min(plan.predicted_loss for plan in apart.values())
    # Dense tensors are among the choices of pairs, whose key costs a few bytes: never noticeably worse.
    assert apart["factored"].predicted_loss <= apart["stock"].predicted_loss
    assert any("factored" in note and "stock" in note and "nats" in note for note in extended.notes)
    assert any("make llama-cpp" in note for note in apart["factored"].notes)


def test_auto_fails_only_when_no_layout_fits(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    with pytest.raises(InfeasibleBudgetError) as nothing:
        planned(ranked, 1000, AUTO, types=("q4_0",))
    smallest = nothing.value.smallest_feasible_bytes
    # One of the two layouts does not fit into this; the other one is planned.
    assert planned(ranked, smallest, AUTO, types=("q4_0",)).planned_bytes <= smallest


def test_a_budget_that_only_another_format_fits(ranked: tuple[Checkpoint, ScoreFile]) -> None:
    """ONNX has factor pairs by default, so it goes further down than dense q8_0."""
    request = PlanRequest("gguf", 1000, "file", types=("q8_0",))
    (onnx,) = other_requests(*ranked, request)
    assert onnx.flags == "--format onnx  without --types"
    with pytest.raises(InfeasibleBudgetError, match=f"These settings fit:(.|\n)*{onnx.flags}"):
        plan_export(*ranked, replace(request, budget_bytes=onnx.floor))
    with pytest.raises(InfeasibleBudgetError) as neither:
        plan_export(*ranked, replace(request, budget_bytes=onnx.floor - 1))
    assert "--format onnx" not in str(neither.value)
    # The other format has a plan of exactly that size. (Without measured rounding errors, which change no sizes.)
    question = resolve(PlanRequest("onnx", onnx.floor, "file"), ranked[0])
    problem = Problem.of(*ranked, question.space)
    assert make_plan(problem, question.budget, question.rule).planned_bytes == onnx.floor
