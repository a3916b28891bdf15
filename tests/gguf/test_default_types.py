"""The types that a plan chooses from when none are named, by the length of the rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from acip_export.api import export_model, plan_export, rounding_errors
from acip_export.formats.registry import export_format
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest, Problem, resolve
from acip_export.planning.candidates import pair_types
from acip_export.weight_types import AllowedTypes, undominated, weight_type
from tests.support import make_model, make_scores

GGUF = export_format("gguf")
# Blocks of 32; and of 64, which rows of 576 fit but not those of 288.
OF_32, NARROW = {"q5_1", "q5_0", "q4_1", "iq4_nl"}, {"q5_1", "q5_0", "q4_1", "iq4_nl", "q2_0"}


def names(types: tuple[object, ...]) -> set[str]:
    return {str(getattr(t, "name", t)) for t in types}


def allowed(*chosen: str) -> AllowedTypes:
    return AllowedTypes(
        GGUF.choose_types(chosen), () if chosen else tuple(GGUF.type(name) for name in GGUF.narrow_types)
    )


@pytest.mark.parametrize("columns", [576, 640, 896, 960])
def test_small_blocks_join_where_rows_are_no_multiple_of_256(columns: int) -> None:
    assert names(allowed().of_row(columns)) == {"f16", "q8_0", "q4_0"} | NARROW


@pytest.mark.parametrize("columns", [256, 1536, 4096])
def test_elsewhere_large_blocks_are_better_at_the_same_bytes(columns: int) -> None:
    chosen = names(allowed().of_row(columns))
    assert chosen == set(GGUF.types)
    assert {"iq3_s", "iq2_s"} < chosen
    assert not chosen & NARROW


def test_named_types_are_joined_by_none() -> None:
    assert names(allowed("q8_0", "q4_k").of_row(576)) == {"q8_0"}
    assert names(allowed("q5_0").of_row(256)) == {"q5_0"}


def test_every_default_type_runs_in_stock_llama_cpp() -> None:
    """All are ggml's own, none is of our extension; and what joins has smaller blocks than what it stands in for."""
    for name in GGUF.types + GGUF.narrow_types:
        assert name in names(GGUF.weight_types)
    assert {weight_type("gguf", name).block for name in GGUF.narrow_types} == {32, 64}


def test_the_documentation_lists_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].split(":")[0].strip(): line for line in text.splitlines() if line.startswith("| ")}
    for columns, row in ((256, "multiples of 256"), (576, "other multiples of 32")):
        assert set(lines[row].split("|")[2].replace("`", "").split()) == names(allowed().of_row(columns))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose layers read rows of 288 and of 512 weights."""
    directory = tmp_path_factory.mktemp("uneven") / "tiny"
    return Checkpoint.open(make_model(directory, hidden_size=288, intermediate_size=512))


def test_every_tensor_has_the_types_of_its_rows(uneven: Checkpoint) -> None:
    problem = Problem.of(uneven, make_scores(uneven.path), resolve(PlanRequest("gguf"), uneven).space)
    types = {c.name: {option.type for option in c.options} for c in problem.candidates}
    assert types["model.layers.0.mlp.up_proj.weight"] == {"f16", "q8_0", "q4_0"} | OF_32
    assert types["model.layers.0.mlp.down_proj.weight"] == set(GGUF.types)
    assert types["model.embed_tokens.weight"] == {"f16", "q8_0", "q4_0"} | OF_32


def test_the_embedding_takes_what_it_can_when_no_named_type_is_for_it(uneven: Checkpoint) -> None:
    space = resolve(PlanRequest("gguf", types=("iq4_xs",)), uneven).space
    assert names(space.allowed_in_embedding.of_row(256)) == set(GGUF.embedding_types) - NARROW
    assert names(space.allowed_in_embedding.of_row(288)) == {"f16", "q8_0", "q4_0"} | OF_32


def test_pairs_have_the_types_of_their_rows_and_the_two_closest() -> None:
    assert names(undominated(GGUF.choose_types(("q8_0", "q5_0", "q4_0", "iq4_nl")))) == {"q8_0", "q5_0", "iq4_nl"}
    assert {down for down, _ in pair_types(allowed(), [4096])} == set(GGUF.types) - {"f16"}
    assert {down for down, _ in pair_types(allowed(), [576])} >= NARROW
    assert {"iq4_nl", "q4_1"} == {up for down, up in pair_types(allowed(), [256]) if down == "q4_k"} - {"q4_k"}


@pytest.mark.slow
def test_a_default_plan_with_small_blocks_is_written_as_planned_and_runs(uneven: Checkpoint, tmp_path: Path) -> None:
    scores = make_scores(uneven.path)
    budget = int(0.36 * uneven.weight_bytes / 2) + 40_000
    plan = plan_export(uneven, scores, PlanRequest("gguf", budget, "file", context=64))
    used = {d.type for d in plan.tensors if len(d.shape) == 2}
    assert used & NARROW
    report = export_model(uneven, scores, plan, tmp_path / "export", sizes=())
    assert report is not None
    assert report.passed
    assert report.written_bytes == report.planned_bytes <= budget
    measured = rounding_errors(uneven, scores, resolve(PlanRequest("gguf"), uneven).space).dense
    assert set(measured["model.layers.0.mlp.up_proj.weight"]) == {"f16", "q8_0", "q4_0"} | OF_32
