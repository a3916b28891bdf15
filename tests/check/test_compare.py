"""Verdicts, from snapshots made by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acip_export.check.compare import evaluate, missing
from acip_export.check.config import Entry, Growth
from acip_export.check.quality import Quality
from acip_export.check.snapshot import FileRecord, Snapshot
from acip_export.inspection.diff import REST, Stored, diff_tensors

ONE_PERCENT = Growth(Fraction(1, 100), None)
GOOD = Quality(0.95, "perplexity", 1.0, 1000)


def snapshot(
    total: int = 1000, quality: Quality | None = None, architecture: str = "llama", **tensors: tuple[str, int]
) -> Snapshot:
    stored = {name: Stored(kind, (4, 256), size) for name, (kind, size) in tensors.items()}
    return Snapshot("m.gguf", "gguf", architecture, {"m.gguf": FileRecord(total)}, stored, quality)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 200), st.integers(1, 10**5))
def test_growth_fails_exactly_beyond_the_smaller_limit(now: int, before: int, percent: int, absolute: int) -> None:
    growth = Growth(Fraction(percent, 100), absolute)
    result = evaluate(Entry("m", "m", max_growth=growth), snapshot(now), snapshot(before), "lock")
    fails = (now - before) * 100 > percent * before or now - before > absolute
    assert (result.status == "failed") == fails
    assert result.delta == now - before
    assert not fails or result.problems[0].rule == "max_growth"


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_size_fails_exactly_beyond_its_limit(now: int, limit: int) -> None:
    """With or without a baseline."""
    result = evaluate(Entry("m", "m", max_bytes=limit), snapshot(now), None, "lock")
    assert (result.status == "failed") == (now > limit)


@given(st.dictionaries(st.text("abcdef", min_size=1), st.tuples(st.sampled_from(["q4", "q8"]), st.integers(0, 99))))
def test_changes_explain_every_byte(tensors: dict[str, tuple[str, int]]) -> None:
    """What the tensors and the rest gained is what the files gained, and nothing unchanged is listed."""
    before = snapshot(10_000, a=("q4", 7), b=("q4", 70))
    after = snapshot(12_345, **{"b": ("q4", 70), **tensors})
    changes = evaluate(Entry("m", "m", max_bytes=1), after, before, "lock").changes
    assert sum(change.delta for change in changes) == 2_345
    assert all(change.before != change.after for change in changes)
    assert [abs(c.delta) for c in changes] == sorted((abs(c.delta) for c in changes), reverse=True)
    back = diff_tensors(after.tensors, before.tensors)
    forth = diff_tensors(before.tensors, after.tensors)
    assert {c.name: -c.delta for c in back} == {c.name: c.delta for c in forth}


def test_says_which_tensors_grew() -> None:
    before = snapshot(1000, q=("q4_k", 100), k=("q4_k", 100), v=("q4_k", 100), o=("q4_k", 100), d=("q8_0", 90))
    after = snapshot(1340, q=("q8_0", 300), k=("q8_0", 250), v=("q6_k", 150), o=("q5_k", 120), n=("f32", 10))
    result = evaluate(Entry("m", "m", max_growth=ONE_PERCENT), after, before, "lock")
    message = result.problems[0].message
    assert "grew by +340 B (+34.00%)" in message
    assert "Grown: q +200 B (q4_k → q8_0), k +150 B" in message
    assert " and 2 more" in message
    assert "check --update" in message
    what = {change.name: change.what for change in result.changes}
    assert what["n"] == "new, f32"
    assert what["d"] == "gone, was q8_0"
    assert REST not in what


def test_growth_without_a_baseline_fails() -> None:
    entry = Entry("m", "m", max_bytes=2000, max_growth=ONE_PERCENT)
    (problem,) = evaluate(entry, snapshot(1000), None, "acip-check.lock.json").problems
    assert (problem.rule, problem.broken) == ("max_growth", True)
    assert "check --update" in problem.message


@pytest.mark.parametrize(
    "before",
    [snapshot(architecture="qwen2", a=("q4", 1)), snapshot(b=("q4", 1))],
    ids=["architecture", "no tensor in common"],
)
def test_baseline_of_another_model_fails(before: Snapshot) -> None:
    result = evaluate(Entry("m", "m", max_growth=ONE_PERCENT), snapshot(a=("q4", 1)), before, "lock")
    assert result.problems[0].broken
    assert "another model" in result.problems[0].message
    assert (result.baseline_bytes, result.changes) == (None, ())


def test_shrinkage_suggests_tightening() -> None:
    entry = Entry("m", "m", max_bytes=1200, max_growth=ONE_PERCENT)
    result = evaluate(entry, snapshot(500), snapshot(1000), "lock")
    assert result.status == "ok"
    assert "shrank by -500 B (-50.00%)" in result.notes[0]
    assert "check --update" in result.notes[0]
    assert '"600B"' in result.notes[1]
    assert evaluate(entry, snapshot(990), snapshot(1000), "lock").notes == ()
    assert evaluate(replace(entry, max_growth=None), snapshot(989), snapshot(1000), "lock").notes != ()


@pytest.mark.parametrize(("recovery", "fails"), [(0.9501, False), (0.95, False), (0.9499, True)])
def test_recovery(recovery: float, fails: bool) -> None:
    now = snapshot(quality=replace(GOOD, recovery=recovery))
    result = evaluate(Entry("m", "m", min_recovery=0.95), now, None, "lock")
    assert [p.rule for p in result.problems] == (["min_recovery"] if fails else [])
    assert not any(p.broken for p in result.problems)


@pytest.mark.parametrize("quality", [None, replace(GOOD, recovery=None)])
def test_recovery_that_is_not_known_fails(quality: Quality | None) -> None:
    result = evaluate(Entry("m", "m", min_recovery=0.5), snapshot(quality=quality), None, "lock", "no report")
    assert result.problems[0].broken
    assert "no report" in result.problems[0].message


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        (2.0, 3.0, ""),
        (2.0, 3.01, "loads in 3.01 s"),
        (0.1, 0.6, ""),
        (0.1, 0.61, "loads in 0.61 s"),
        (None, 1.0, "lock has none"),
        (1.0, None, "its report has none"),
    ],
)
def test_load_time(before: float | None, after: float | None, rule: str) -> None:
    entry = Entry("m", "m", max_load_time_ratio=1.5)
    now, then = (snapshot(quality=replace(GOOD, load_seconds=seconds)) for seconds in (after, before))
    problems = evaluate(entry, now, then, "lock").problems
    assert [rule in p.message for p in problems] == ([True] if rule else [])


def test_missing_policies() -> None:
    assert missing(Entry("m", "m"), "gone").status == "failed"
    skipped = missing(Entry("m", "m", missing="skip"), "gone")
    assert (skipped.status, skipped.problems) == ("skipped", ())
    assert "gone" in skipped.notes[0]
