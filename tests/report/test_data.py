from __future__ import annotations

import dataclasses
import json
import shutil
from math import exp
from pathlib import Path

import pytest

from acip_export import api as pipeline
from acip_export.api import report as reporting
from acip_export.artifacts.names import CARD_FILE, MARK_FILE, PAGE_FILE, PAPERS, TUNED_FILE
from acip_export.artifacts.plan import Plan
from acip_export.artifacts.report import Report
from acip_export.artifacts.scores import RankedOn
from acip_export.errors import InputError, PlanFileError
from acip_export.report import Exported, Ranking, build_page, card, read_export
from acip_export.report.origin import hub_id, license_of
from acip_export.report.page import embedded, size_of
from tests.report.conftest import BUDGETS, TYPES, Exports

RANKING = Ranking(
    {"name": "kfac", "basis": "kfac"},
    RankedOn("a/b.txt", "0" * 64, 100),
    {"torch": "2"},
    ((1.0, 2.0, None),),
)


def _report(export: Exported) -> Report:
    assert export.report is not None
    return export.report


@pytest.mark.slow
def test_papers_do_not_count_as_bytes_of_the_export(exports: Exports) -> None:
    assert {PAGE_FILE, CARD_FILE} <= PAPERS
    for directory in exports.directories:
        plan = read_export(directory).plan
        others = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file() and f.name not in PAPERS)
        assert others == plan.planned_bytes
        assert {f.name for f in directory.iterdir()} >= PAPERS - {MARK_FILE, TUNED_FILE}


def test_planned_sizes_span_all_that_is_feasible(exports: Exports) -> None:
    used = [plan.used_bytes for plan in exports.sizes]
    losses = [plan.predicted_loss for plan in exports.sizes]
    assert 4 <= len(used) <= 6
    assert used == sorted(used)
    assert losses == sorted(losses, reverse=True)
    assert {plan.serving for plan in exports.sizes} == {read_export(exports.directories[0]).plan.serving}
    # More bytes than the last one takes would change nothing.
    assert exports.sizes[-1].certificate.next_upgrade is None
    assert {d.type for plan in exports.sizes for d in plan.tensors if d.type} <= {"f32", *TYPES}


def test_sizes_are_the_plans_in_order_with_the_own_one_marked(exports: Exports) -> None:
    own, other = (read_export(directory) for directory in exports.directories)
    page = build_page(own, [other], exports.sizes)
    assert [size.used for size in page.sizes] == sorted({p.used_bytes for p in (*exports.sizes, own.plan, other.plan)})
    assert page.sizes[page.own_size] == size_of(own.plan)
    for size in page.sizes:
        assert size.files == size.vectors + size.overhead + sum(cell.nbytes for cell in size.cells)
        assert sum(nbytes for _, nbytes, inside in size.breakdown if inside) == size.used <= size.budget
    assert [(name, layer, kind) for name, layer, kind, _, _ in page.matrices][1:3] == [
        ("model.layers.0.mlp.down_proj", 0, "mlp.down_proj"),
        ("model.layers.0.mlp.gate_proj", 0, "mlp.gate_proj"),
    ]
    assert page.matrices[0][:2] == ("model.embed_tokens", -1)


def test_measured_figures_are_the_reports(exports: Exports) -> None:
    found = [read_export(directory) for directory in exports.directories]
    page = build_page(found[0], found[1:], exports.sizes)
    assert len(page.measured) == 2
    for export, measured in zip(found, page.measured, strict=True):
        assert measured.perplexity == _report(export).runtimes[0].perplexity.perplexity
        assert measured.low is not None
        assert measured.high is not None
        assert measured.low < measured.perplexity < measured.high
        assert page.sizes[measured.point].used == export.plan.used_bytes
    dense = _report(found[0]).dense_perplexity.perplexity
    assert page.dense_perplexity == dense
    # Prediction and measurement are shown on the same text.
    own = page.sizes[page.own_size]
    assert page.predicted(own) == pytest.approx(dense * exp(own.loss))


def test_score_map_follows_the_ranking(exports: Exports) -> None:
    page = build_page(read_export(exports.directories[0]), (), exports.sizes, None, reporting.score_map(exports.scores))
    shares = [size.ranking for size in page.sizes]
    ratios = [size.ranking_ratio for size in page.sizes]
    # Between neighbours bytes may move from ranks to bits.
    assert (ratios[0] or 0) < (ratios[-1] or 0)
    smallest, largest = shares[0], shares[-1]
    assert smallest is not None and largest is not None
    assert smallest[0] is largest[0] is None  # the embedding is not ranked
    assert all((a or 0) <= (b or 0) for a, b in zip(smallest, largest, strict=True))
    module, ratio = page.matrices[1][0], ratios[0]
    assert ratio is not None
    rank = exports.scores.ranks_at(ratio)[module]
    assert shares[0] is not None
    assert shares[0][1] == pytest.approx(rank / len(exports.scores.modules[module].scores))


def test_a_page_is_read_back_when_the_score_file_is_gone(exports: Exports, tmp_path: Path) -> None:
    directory = tmp_path / "export"
    shutil.copytree(exports.directories[0], directory)
    pipeline.write_report(directory, exports.checkpoint, exports.scores, [exports.directories[1]], exports.sizes)
    first = (directory / PAGE_FILE).read_text(encoding="utf-8"), (directory / CARD_FILE).read_text(encoding="utf-8")
    pipeline.write_report(directory)
    assert ((directory / PAGE_FILE).read_text(encoding="utf-8"), (directory / CARD_FILE).read_text("utf-8")) == first
    data = embedded(first[0])
    assert data is not None
    assert data.ranking is not None
    assert data.ranking.license == "apache-2.0"
    assert len(data.measured) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"fingerprint": "other"},
        {"layout": "other"},
        {"points": [{}]},
        {"points": 7},
        {"types": []},
        {"measured": [{"point": 99}]},
    ],
    ids=str,
)
def test_an_earlier_page_that_does_not_fit_is_not_used(exports: Exports, change: dict[str, object]) -> None:
    own = read_export(exports.directories[0])
    text = (exports.directories[0] / PAGE_FILE).read_text(encoding="utf-8")
    before = embedded(text)
    assert before is not None
    whole = build_page(own, before=before)
    assert len(whole.sizes) > 2
    island = json.dumps({**before.to_json(), **change}).replace("<", "\\u003c")
    changed = embedded(f'<script type="application/json" id="data">{island}</script>')
    assert build_page(own, before=changed) == build_page(own)


def test_exports_of_something_else_are_refused(exports: Exports) -> None:
    own, other = (read_export(directory) for directory in exports.directories)
    changes = ({"model_fingerprint": "0" * 64}, {"layout": "other"}, {"budget_scope": "file"})
    for change in changes:
        wrong = dataclasses.replace(other, plan=dataclasses.replace(other.plan, **change))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="a report of its own"):
            build_page(own, [wrong])


def _no_plan(directory: Path) -> None:
    (directory / "plan.json").unlink()


def _damaged(directory: Path) -> None:
    (directory / "report.json").write_text("{")


def _newer(directory: Path) -> None:
    _edit(directory, version=3)


def _of_another_export(directory: Path) -> None:
    _edit(directory, planned_bytes=1)


def _edit(directory: Path, **changes: object) -> None:
    file = directory / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("harm", "error", "says"),
    [
        (_no_plan, PlanFileError, "is no export: it"),
        (_damaged, InputError, "is no JSON"),
        (_newer, InputError, "version 3, this tool reads 2"),
        (_of_another_export, InputError, "not of the plan beside it"),
    ],
)
def test_bad_exports(exports: Exports, tmp_path: Path, harm: object, error: type[Exception], says: str) -> None:
    directory = tmp_path / "export"
    shutil.copytree(exports.directories[0], directory)
    assert callable(harm)
    harm(directory)
    before = (directory / PAGE_FILE).read_bytes()
    with pytest.raises(error, match=says):
        pipeline.write_report(directory)
    assert (directory / PAGE_FILE).read_bytes() == before


def test_an_export_that_was_never_verified(exports: Exports, tmp_path: Path) -> None:
    directory = tmp_path / "export"
    shutil.copytree(exports.directories[0], directory)
    for name in ("report.json", PAGE_FILE, CARD_FILE):
        (directory / name).unlink()
    page, card = pipeline.write_report(directory)
    assert "Not measured" in page.read_text(encoding="utf-8")
    assert "not verified" in card.read_text(encoding="utf-8")


def test_without_perplexity_there_is_none(exports: Exports) -> None:
    """As for encoders: no plan predicts a perplexity, no report has one."""
    export = read_export(exports.directories[0])
    plan: Plan = dataclasses.replace(export.plan, task="embedding", predicted_perplexity=None)
    runtimes = tuple(dataclasses.replace(runtime, perplexity=None) for runtime in _report(export).runtimes)
    report = dataclasses.replace(_report(export), runtimes=runtimes, dense_perplexity=None, similarity=0.98)
    page = build_page(Exported(plan, report), ranking=RANKING)
    assert page.measured == ()
    assert page.predicted(page.sizes[0]) is None
    assert page.data().points[0].shown is None
    assert 'pipeline_tag: "sentence-similarity"' in card.render(page, ())
    classifier = build_page(Exported(dataclasses.replace(plan, task="classification"), None))
    assert 'pipeline_tag: "text-classification"' in card.render(classifier, ())


def test_origin_of_a_model(tmp_path: Path) -> None:
    cached = tmp_path / "models--some-owner--a_model.v2" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert hub_id(cached) == "some-owner/a_model.v2"
    assert hub_id(tmp_path) == ""
    assert license_of(tmp_path) == ""
    for text, expected in (
        ("---\nlicense: MIT\n---\n", "mit"),
        ('---\ntags: [a]\nlicense: "llama3.2"\n---\n# x', "llama3.2"),
        ("# no front matter\n\nlicense: mit\n", ""),
        ("---\nlicense: mit\n", ""),
        ("---\nlicense: <script>\n---\n", ""),
        ("---\nlicense_name: mit\n---\nlicense: mit\n", ""),
    ):
        (tmp_path / "README.md").write_text(text)
        assert license_of(tmp_path) == expected, text


def test_budgets_of_the_fixture_differ(exports: Exports) -> None:
    assert [read_export(directory).plan.budget_bytes for directory in exports.directories] == list(BUDGETS)
