"""The KV cache where nothing is asked of it: chosen with the weights once the default type takes much of the budget."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import acip_export
from acip_export.api import Known, open_scores, plan_export, sweep_sizes
from acip_export.api.cache_types import with_cache_to_choose
from acip_export.artifacts.cache_losses import CacheLosses, cache_file, save_cache_losses
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import InfeasibleBudgetError
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, Problem, resolve
from acip_export.progress import Progress
from acip_export.units import format_bytes
from tests.encoders import make_encoder
from tests.ranking.support import calibration_text
from tests.support import make_model, make_scores

CONTEXT = 1024
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
}
ASKED = PlanRequest("onnx", types=("int8", "int4"), context=CONTEXT, prompt_batch=16, calibrate=True)
NOTE = "the best for this budget: in f32, the default, the cache would take"

Ranked = tuple[Checkpoint, ScoreFile]


@pytest.fixture(scope="module")
def without_figures(tmp_path_factory: pytest.TempPathFactory) -> Ranked:
    """A model, and scores with a text to measure on."""
    directory = tmp_path_factory.mktemp("ranked")
    model = make_model(directory / "m", **SIZES)
    text = calibration_text(directory / "text.txt")
    acip_export.rank(model, text, out=model / "m.acip", algorithm="magnitude", context=128)
    return Checkpoint.open(model), open_scores(Checkpoint.open(model), None)


@pytest.fixture
def ranked(without_figures: Ranked) -> Ranked:
    """The same, of which no cache was measured yet."""
    file = without_figures[1].file
    assert file is not None
    cache_file(file, "onnx").unlink(missing_ok=True)
    return without_figures


def at(ranked: Ranked, cache_type: str, more: int = 20_000) -> int:
    """A budget that is a little more than the smallest with a cache of this type."""
    plan = plan_export(*ranked, replace(ASKED, budget_bytes=10**9, types=("int4",), cache_type=cache_type))
    return plan.used_bytes + more


def noted(plan: Plan) -> bool:
    return any(NOTE in note for note in plan.notes)


def test_it_is_chosen_where_the_default_takes_much_of_the_budget(ranked: Ranked) -> None:
    tight = replace(ASKED, budget_bytes=at(ranked, "f32"))
    file = cache_file(ranked[1].file or Path(), "onnx")
    # Where there is room for everything, or it says what it wants, nothing is measured.
    assert plan_export(*ranked, replace(ASKED, budget_bytes=10**9)).serving.cache_types == "f32"
    named = plan_export(*ranked, replace(tight, cache_type="f32"))
    assert named.serving.cache_types == "f32" and not noted(named) and not file.exists()
    stages: list[Progress] = []
    plan = plan_export(*ranked, tight, stages.append)
    # First: those who stop it then have lost nothing.
    order = list(dict.fromkeys(each.stage for each in stages if each.stage != "graph"))
    assert order[0] == "KV cache types" and file.exists()
    assert plan.serving.cache_types == "int8" and noted(plan)
    assert plan.predicted_loss < named.predicted_loss
    assert plan == replace(
        plan_export(*ranked, replace(tight, cache_type="auto")), notes=plan.notes
    )  # as when it was asked for
    # The flag that keeps the default is one, and the only one that is named for it.
    (flag,) = {name for note in plan.notes for name in re.findall(r"--cache-type (\S+)", note)}
    kept = plan_export(*ranked, replace(tight, cache_type=flag))
    assert (kept.serving, kept.tensors) == (named.serving, named.tensors)
    # A budget that has no plan with the default has one, and no flag is said to keep it.
    asked = replace(tight, budget_bytes=at(ranked, "int4", 0))
    smallest = plan_export(*ranked, asked)
    assert smallest.serving.cache_types == "int4" and not noted(smallest)
    with pytest.raises(InfeasibleBudgetError) as refused:
        plan_export(*ranked, replace(asked, cache_type="f32"))
    (note,) = (note for note in smallest.notes if "the best for this budget" in note)
    assert note.endswith(f"in f32, the default, plans begin at {format_bytes(refused.value.smallest_feasible_bytes)}")


@pytest.mark.parametrize("more", [0, 20_000])
def test_gguf_names_its_own_default(ranked: Ranked, more: int) -> None:
    scores = ranked[1]
    assert scores.file is not None
    known = {"f16": 0.0, "q8_0": 1e-4, "f32": 0.0, "q4_0": 2e-2}
    runtime = export_format("gguf").quantizer()
    every = {name: known.get(name, 1.0) for name in export_format("gguf").cache_types}
    save_cache_losses(CacheLosses("gguf", runtime, scores.sha256, keys=every, values=every), scores.file)
    asked = PlanRequest("gguf", 10**9, types=("q8_0", "q4_0"), context=CONTEXT, prompt_batch=16)
    least = plan_export(*ranked, replace(asked, types=("q4_0",), cache_type="f16" if more else "q4_0")).used_bytes
    plan = plan_export(*ranked, replace(asked, budget_bytes=least + more))
    assert plan.serving.cache_types != "f16"
    text = " ".join(plan.notes)
    assert "f32" not in text
    assert ("--cache-type f16  keeps the default" in text) == (more > 0)
    assert ("in f16, the default, plans begin at" in text) == (more == 0)
    if more:
        kept = plan_export(*ranked, replace(asked, budget_bytes=least + more, cache_type="f16"))
        assert kept.serving.cache_types == "f16"


def test_without_measuring_it_takes_what_is_known(ranked: Ranked) -> None:
    tight = replace(ASKED, budget_bytes=at(ranked, "f32"), calibrate=False)
    plan = plan_export(*ranked, tight)
    assert plan.serving.cache_types == "f32" and not noted(plan)
    assert any(each.change == "--cache-type int8" for each in plan.certificate.alternatives)
    plan_export(*ranked, replace(tight, cache_type="auto"))
    assert plan_export(*ranked, tight).serving.cache_types == "int8"


def test_without_a_text_it_stays(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", **SIZES)
    ranked = Checkpoint.open(model), make_scores(model)
    plan = plan_export(*ranked, replace(ASKED, budget_bytes=at(ranked, "f32")))
    assert plan.serving.cache_types == "f32" and not noted(plan)
    assert any(each.change == "--cache-type int8" for each in plan.certificate.alternatives)


@pytest.mark.parametrize(
    "changed",
    [
        {"budget_scope": "file"},
        {"context": "max"},
        {"context": 64},
        {"whole_prompts": True, "prompt_batch": None},
        {"backend": "webgpu", "types": ()},
        {"budget_bytes": 10**9},
    ],
    ids=str,
)
def test_others_keep_the_default(ranked: Ranked, changed: dict[str, object]) -> None:
    plan_export(*ranked, replace(ASKED, budget_bytes=10**9, cache_type="auto"))  # measured
    tight = replace(ASKED, budget_bytes=at(ranked, "f32"))
    made = partial(Problem.of, *ranked)
    assert len(with_cache_to_choose(*ranked, tight, resolve(tight, ranked[0]), made).caches) == 3
    other = replace(tight, **changed)
    question = resolve(other, ranked[0])
    assert with_cache_to_choose(*ranked, other, question, made) is question


def test_encoders_have_none(tmp_path: Path) -> None:
    model = make_encoder(tmp_path / "m")
    request = PlanRequest("onnx", 10**6, calibrate=True)
    question = resolve(request, Checkpoint.open(model))
    ranked = Checkpoint.open(model), make_scores(model)
    assert with_cache_to_choose(*ranked, request, question, partial(Problem.of, *ranked)) is question


def test_each_of_several_budgets_has_its_own(ranked: Ranked) -> None:
    known: Known = {}
    tight = at(ranked, "f32")
    found = [
        plan_export(*ranked, replace(ASKED, budget_bytes=nbytes), known=known).serving.cache_types
        for nbytes in (10**9, tight, 10**9)
    ]
    assert found == ["f32", "int8", "f32"]


def test_scores_in_no_file_are_measured_once(ranked: Ranked) -> None:
    checkpoint, scores = ranked
    tight = replace(ASKED, budget_bytes=at(ranked, "f32"))
    unsaved = replace(scores, file=None)
    stages: list[Progress] = []
    for _ in range(2):
        assert plan_export(checkpoint, unsaved, tight, stages.append).serving.cache_types == "int8"
    assert sum(each.stage == "KV cache types" and each.done == 1 for each in stages) == 1


def test_a_sweep_has_what_plans_have(ranked: Ranked) -> None:
    (line,) = sweep_sizes(*ranked, [("onnx", ASKED)])
    assert {point.cache_type_k for point in line.points} == {"int4", "int8", "f32"}
    (named,) = sweep_sizes(*ranked, [("onnx", replace(ASKED, cache_type="f32"))])
    assert {point.cache_type_k for point in named.points} == {"f32"}
