"""Plans whose values have the right types and are wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acip_export.artifacts.plan import decode_plan, load_plan, numbers_sha256, save_plan
from acip_export.errors import PlanFileError
from tests.artifacts.examples import PLAN

Edit = Callable[[dict[str, Any]], None]
LORA, PAIR, NORM = 1, 2, 3  # of the tensors


def of(index: int, **fields: Any) -> Edit:
    return lambda plan: plan["tensors"][index].update(fields)


def serving(**fields: Any) -> Edit:
    return lambda plan: plan["serving"].update(fields)


def file_named(name: str) -> Edit:
    def edit(plan: dict[str, Any]) -> None:
        plan["files"] = {name: plan["planned_bytes"]}

    return edit


def twice(plan: dict[str, Any]) -> None:
    plan["tensors"].append(plan["tensors"][0])


WRONG: dict[str, tuple[Edit, str]] = {
    "kept falls": (of(PAIR, kept=[[10, 14], [0, 4]]), r"\$.tensors\[2\] \(.*down_proj.weight\): kept must be growing"),
    "kept overlaps": (of(PAIR, kept=[[0, 5], [4, 7]]), "growing"),
    "kept touches": (of(PAIR, kept=[[0, 4], [4, 8]]), "growing"),
    "kept backwards": (of(PAIR, kept=[[4, 2], [10, 14]]), "growing"),
    "an empty range": (of(PAIR, kept=[[0, 4], [10, 10]]), "growing"),
    "nothing kept": (of(PAIR, kept=[]), r"\$.tensors\[2\].kept: expected array of length >= 1"),
    "kept past the end": (of(PAIR, kept=[[0, 4], [29, 33]]), "growing ranges below 32"),
    "kept far past the end": (of(PAIR, kept=[[0, 4], [10, 2**62]]), "growing ranges below 32"),
    "more kept than the rank": (of(PAIR, kept=[[0, 9]]), "kept are 9 components, its rank is 8"),
    "one number": (of(PAIR, kept=[[4]]), "expected array of length 2"),
    "kept of a dense matrix": (of(0, kept=[[0, 4]]), "dense, and yet of a rank"),
    "rank of a dense matrix": (of(0, rank=4), "dense, and yet of a rank"),
    "type of a pair": (of(PAIR, type="f16"), "factored, and yet of the type f16"),
    "pair of a vector": (of(NORM, representation="factored", rank=1, up_type="f16", down_type="f16"), "two dimensions"),
    "huge rank": (of(PAIR, rank=10**9), "its rank is 1000000000, of 32 components"),
    "three dimensions": (of(0, shape=[2, 3, 4]), "expected array of length <= 2"),
    "no dimension": (of(0, shape=[]), "expected array of length"),
    "empty dimension": (of(0, shape=[0, 32]), r"\$.tensors\[0\].shape\[0\]: expected int >= 1"),
    "no type": (of(0, type=None), "dense without a type"),
    "unknown type": (of(0, type="q9"), "gguf has no type 'q9'"),
    "other bytes": (of(0, nbytes=1), "its decision takes"),
    "a tensor twice": (twice, "decided about twice"),
    "no context": (serving(context=0), r"\$.serving.context: expected int >= 1"),
    "negative context": (serving(context=-1), r"\$.serving.context: expected int >= 1"),
    "absurd context": (serving(context=10**12), r"\$.serving.context: expected int <= 2147483647"),
    "no prompt batch": (serving(prompt_batch=0), r"\$.serving.prompt_batch"),
    "negative prompt batch": (serving(prompt_batch=-5), r"\$.serving.prompt_batch"),
    "sum": (lambda plan: plan.update(memory_bytes=7), r"\$.memory_bytes: the breakdown add up"),
    "budget": (lambda plan: plan.update(budget_bytes=7), r"\$.budget_bytes: it uses"),
    "scope": (lambda plan: plan.update(budget_scope="all"), r"\$.budget_scope: invalid enum value 'all'"),
    "no layout": (lambda plan: plan.pop("layout"), "missing required field layout"),
    "representation": (of(0, representation="folded"), r"\$.tensors\[0\].representation: invalid enum value 'folded'"),
    "task": (lambda plan: plan.update(task="chat"), r"\$.task: invalid enum value 'chat'"),
}
NAMES = (
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "/x",
    "a//b",
    "a/",
    "./a",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x1b[2J",
    "plan.json",
    "report.json",
    "README.md",
    "x" * 300,
    "ä" * 200,
    "a/" + "x" * 300,
)


def edited(edit: Edit) -> bytes:
    document = PLAN.to_json()
    document["tensors"] = [dict(tensor) for tensor in document["tensors"]]
    edit(document)
    return json.dumps(document).encode()


def test_the_example_is_right(tmp_path: Path) -> None:
    assert decode_plan(edited(lambda _: None), "here") == PLAN
    save_plan(PLAN, tmp_path / "plan.json")
    assert load_plan(str(tmp_path / "plan.json")) == PLAN


@pytest.mark.parametrize("case", WRONG)
def test_well_typed_and_wrong(case: str) -> None:
    edit, says = WRONG[case]
    with pytest.raises(PlanFileError, match=says) as caught:
        decode_plan(edited(edit), "plan.json")
    assert str(caught.value).startswith("plan.json: $")
    assert "plan again" in str(caught.value)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:9]))
def test_names_that_no_file_of_an_export_has(name: str) -> None:
    with pytest.raises(PlanFileError, match=r"\$.files: .* is no name of a file"):
        decode_plan(edited(file_named(name)), "plan.json")


def test_numbers_follow_from_files_that_options_name(tmp_path: Path) -> None:
    file = tmp_path / "importance.gguf"
    file.write_bytes(b"one")
    plan = dataclasses.replace(PLAN, options={**PLAN.options, "imatrix": str(file)})
    assert numbers_sha256(plan) == numbers_sha256(plan) != numbers_sha256(PLAN)
    before = numbers_sha256(plan)
    file.write_bytes(b"other")
    assert numbers_sha256(plan) != before
    file.unlink()
    assert numbers_sha256(plan) != before


def test_versions_come_first() -> None:
    """A newer plan may have anything in it; what is said is that it is newer."""
    newer = {**PLAN.to_json(), "version": 3, "tensors": {"now": "an object"}, "more": 1}
    with pytest.raises(PlanFileError, match="a plan of version 3, this tool reads 2; plan again"):
        decode_plan(json.dumps(newer).encode(), "here")
    with pytest.raises(PlanFileError, match="not a plan: its key artifact is 'acip-report'"):
        decode_plan(json.dumps({**newer, "artifact": "acip-report"}).encode(), "here")
    newer.pop("artifact")
    with pytest.raises(PlanFileError, match="not a plan"):
        decode_plan(json.dumps(newer).encode(), "here")
    with pytest.raises(PlanFileError, match="is no JSON"):
        decode_plan(b'{"artifact": "acip-plan", tensors: []}', "here")


def test_byte_order_marks_are_read_and_other_encodings_named() -> None:
    text = json.dumps(PLAN.to_json())
    assert decode_plan(text.encode("utf-8-sig"), "here") == PLAN
    with pytest.raises(PlanFileError, match="here is no JSON: it is no UTF-8"):
        decode_plan(text.encode("utf-16"), "here")
    latin = json.dumps(dataclasses.replace(PLAN, model="é").to_json(), ensure_ascii=False).encode("latin-1")
    with pytest.raises(PlanFileError, match="UTF-8"):
        decode_plan(latin, "here")


@pytest.mark.parametrize(
    "unknown",
    [b'"\xff": 1', b'"more": "\xff"', b'"more": ' + b"9" * 5000, b'"more": ' + b"[" * 100_000 + b"]" * 100_000],
    ids=["key", "text", "number", "depth"],
)
def test_what_has_no_place_is_looked_at_too(unknown: bytes) -> None:
    """The decoder skips fields that it does not know, whatever is in them."""
    text = json.dumps(PLAN.to_json()).encode()
    with pytest.raises(PlanFileError, match="here"):
        decode_plan(text[:-1] + b", " + unknown + b"}", "here")
