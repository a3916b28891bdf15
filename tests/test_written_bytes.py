"""Written bytes equal planned bytes: for every kind of candidate, and for whatever the planner chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acip_export.api import convert_bundle
from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import Plan, Serving, TensorDecision, decision_bytes
from acip_export.artifacts.rounding_errors import RoundingErrors, residual_key
from acip_export.artifacts.scores import ScoreFile
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, PlanRequest, Problem, resolve
from acip_export.planning.candidates import Candidates, residual_bases
from acip_export.weight_types import AllowedTypes, types_of, weight_type
from tests.planning.problems import EXHAUSTIVE, Shape, examples, shapes
from tests.planning.test_properties import WAYS
from tests.support import make_bundle, make_model, make_scores

# Representation, types of the matrix and of its pair, and which of the ranks.
Kind = tuple[str, str | None, str | None, str | None, object]


def kinds_of(candidates: Candidates) -> dict[Kind, TensorDecision]:
    """Of every combination of types the smallest and the largest rank; of corrections, every rank."""
    found: dict[Kind, TensorDecision] = {}
    for option in candidates.options:
        types = (option.representation, option.type, option.up_type, option.down_type)
        if option.representation == "residual":
            found[*types, option.rank] = option
        else:
            found.setdefault((*types, "least"), option)
            found[*types, "most"] = option
    return found


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of an export's files, the copy of its plan left out."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != PLAN_FILE)
    return {str(file.relative_to(directory)): file.stat().st_size for file in files}


def tried_types(target: str, backend: str | None) -> tuple[str, ...]:
    """The default types; or every type that plans may choose, some of which take llama.cpp most of a minute."""
    known = export_format(target).on(backend)
    items = {weight_type(target, name).item_bytes for name in known.types}
    every = (form.name for form in types_of(target) if form.item_bytes in items and form.name not in known.refused)
    return tuple(every) if EXHAUSTIVE else known.types


def plans_with_every_kind(problem: Problem, serving: Serving) -> Iterator[Plan]:
    """As few plans as it takes for every kind of candidate to be chosen somewhere: by layers, embedding and head."""
    kinds = [kinds_of(candidates) for candidates in problem.candidates]
    groups = ["layer" if c.module is not None else c.name for c in problem.candidates]
    pending: dict[str, dict[Kind, None]] = {}
    for group, known in zip(groups, kinds, strict=True):
        pending.setdefault(group, {}).update(dict.fromkeys(known))
    while any(pending.values()):
        picks: dict[int, TensorDecision] = {}
        for candidates, group, known in zip(problem.candidates, groups, kinds, strict=True):
            chosen = next((kind for kind in known if kind in pending[group]), next(iter(known)))
            pending[group].pop(chosen, None)
            picks[id(candidates)] = known[chosen]
        # With one candidate left for each tensor there is one plan.
        alone = problem.only(lambda c, option, picks=picks: option is picks[id(c)])  # type: ignore[misc]
        yield alone.largest("file", serving)


def tied_and_untied() -> Iterator[tuple[str, str, str | None, bool]]:
    """Embeddings and heads are the same in all layouts and backends of a target: both ways in the first alone."""
    for number, (target, layout, backend) in enumerate(WAYS):
        first = backend is None and layout == export_format(target).layouts[0].name
        for tied in (True, False) if EXHAUSTIVE or first else (number % 2 == 0,):
            yield target, layout, backend, tied


@pytest.mark.slow
@pytest.mark.parametrize(("target", "layout", "backend", "tied"), list(tied_and_untied()))
def test_every_candidate_kind(target: str, layout: str, backend: str | None, tied: bool, tmp_path: Path) -> None:
    # Rows of one block of 256.
    model = make_model(tmp_path / "model", tie_word_embeddings=tied, num_hidden_layers=3, intermediate_size=256)
    checkpoint, scores = Checkpoint.open(model), make_scores(model)
    types = tried_types(target, backend)
    question = resolve(PlanRequest(target, backend=backend, layout=layout, types=types, context=64), checkpoint)
    corrections = every_correction(target, layout, types, scores)
    problem = Problem.of(checkpoint, scores, question.space, corrections)
    written: set[str | None] = set()
    for number, plan in enumerate(plans_with_every_kind(problem, question.rule.at_every_budget(512))):
        bundle = make_bundle(model, plan, tmp_path / f"bundle{number}", scores)
        convert_bundle(bundle.path, tmp_path / f"export{number}", check=False)
        assert sizes(tmp_path / f"export{number}") == plan.files
        assert all(d.nbytes == decision_bytes(d, target) for d in plan.tensors)
        written |= {name for d in plan.tensors for name in (d.type, d.up_type, d.down_type)}
    assert written >= set(types)


def every_correction(target: str, layout: str, types: tuple[str, ...], scores: ScoreFile) -> RoundingErrors:
    """Corrections of bases are candidates where they were measured; here everywhere."""
    allowed = AllowedTypes(tuple(weight_type(target, name) for name in types))
    columns = {module.shape[1] for module in scores.modules.values()}
    bases = residual_bases(export_format(target).layout(layout), allowed, columns)
    pairs = {residual_key(base): ((0.5, 0.5),) for base in bases}
    return RoundingErrors(
        format=target, quantizer="none", scores_sha256=scores.sha256, pairs=dict.fromkeys(scores.modules, pairs)
    )


@settings(deadline=None, max_examples=examples(6, 100), suppress_health_check=list(HealthCheck))
@given(shapes(most_layers=2, widest=512), st.sampled_from(WAYS), st.floats(0.02, 0.9), st.integers(0, 9))
def test_planned_exports(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, way: tuple[str, str, str | None], share: float, seed: int
) -> None:
    """Random models and budgets, exported as planned: every file is as large as the plan has it."""
    target, layout, backend = way
    directory = tmp_path_factory.mktemp("planned")
    model = make_model(directory / "model", shape.arch, seed=seed, **shape.settings)
    checkpoint, scores = Checkpoint.open(model), make_scores(model, adapters=seed % 2 == 0, seed=seed)
    question = resolve(PlanRequest(target, backend=backend, layout=layout, context=64), checkpoint)
    problem, serving = (
        Problem.of(checkpoint, scores, question.space),
        question.rule.at_every_budget(512),
    )
    floor = problem.floor("file", serving)
    plan = problem.plan(Budget(floor.nbytes + int(share * checkpoint.weight_bytes), "file"), serving)
    bundle = make_bundle(model, plan, directory / "bundle", scores)
    convert_bundle(bundle.path, directory / "export", check=False)
    assert sizes(directory / "export") == plan.files
