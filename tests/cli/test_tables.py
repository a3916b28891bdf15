"""What commands print, where it does not take a command to see it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acip_export.artifacts.plan import BudgetScope
from acip_export.artifacts.scores import CurvePoint
from acip_export.cli.tables.common import show_changes
from acip_export.cli.tables.inspect import show_anatomy
from acip_export.cli.tables.plan import show_plan, show_plans
from acip_export.cli.tables.ranking import show_ranking
from acip_export.cli.tables.report import hub_name, show_reports
from acip_export.inspection import TensorChange, read_anatomy
from acip_export.inspection.diff import Stored
from acip_export.io.hub import check_repository_id
from tests.reports import REPORT
from tests.support import dense, make_model, make_plan, make_scores, unspaced


@pytest.mark.parametrize("layers", ["model.layers.", "transformer.h.", "bert.encoder.layer."])
def test_layers_share_a_row_whatever_they_are_called(
    layers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(make_model(tmp_path / "m"), "gguf", "stock", dense(type="q8_0"))
    renamed = tuple(replace(d, name=d.name.replace("model.layers.", layers)) for d in plan.tensors)
    breakdown = {"weights": 1, "kv_cache": 0, "compute": 0, "output": 0}
    show_plan(replace(plan, tensors=renamed, breakdown=breakdown), verbose=False)
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "512x256" in line]
    assert ["mlp.up_proj", "2"] in rows
    assert not any(".0." in name for name, *_ in rows)


@pytest.mark.parametrize(
    ("name", "deltas"),
    [("model.layers.11.mlp.down_proj", True), ("language_model.layers.11.self_attn.q_proj", False)],
)
def test_names_of_changed_tensors_stay_in_one_line_of_80_columns(
    name: str, deltas: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    change = TensorChange(
        name + ".weight", Stored("BF16", (576, 1536), 1_769_472), Stored("iq4_xs", (576, 1536), 470_016)
    )
    show_changes([change], 4)
    heads, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert row[0] == name
    assert row[-3:] == ["BF16", "→", "iq4_xs"]
    assert ("change" in heads, "-1.30" in row) == (deltas, deltas)


def test_top_is_of_layers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is beyond is one row, so that the table still adds up."""
    found = read_anatomy(make_model(tmp_path / "m"))
    show_anatomy(found, 2)
    shown = capsys.readouterr().out
    groups = found.by_group()
    rest = shown.partition("\n layers")[2].partition("largest tensors")[0].strip().splitlines()
    assert [line.split()[0] for line in rest[1:3]] == [group.name for group in groups[:2]]
    assert rest[3].split()[:3] == [str(len(groups) - 2), "more", str(sum(g.tensors for g in groups[2:]))]
    assert len(rest) == 4
    assert [line.split()[0] for line in shown.partition("largest tensors")[2].splitlines()[1:3]] == [
        tensor.name for tensor in found.largest(2)
    ]
    show_anatomy(found, len(groups))
    assert " more " not in capsys.readouterr().out
    show_anatomy(found, 0)
    shown = capsys.readouterr().out
    assert "largest tensors" not in shown and "\n layers" not in shown


def test_folded_names_of_files_stay_indented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    model = make_model(tmp_path / "m")
    (model / f"{'long-' * 20}.json").write_text("{}")
    show_anatomy(read_anatomy(model), 0)
    listed = capsys.readouterr().out.partition(" files\n")[2].partition("\n\n")[0].splitlines()
    files = len(list(model.iterdir()))
    assert len(listed) > files, "the long name is folded"
    assert all(line.startswith("   ") and line[3] != " " for line in listed), listed


@pytest.mark.parametrize(
    ("budget", "changes", "said"),
    [
        (3 * 10**9, {"lower_bound": 0.1}, True),
        (10**6, {"lower_bound": 0.1}, False),  # as much as it takes
        (3 * 10**9, {"lower_bound": 0.1, "next_upgrade": "x: f16", "next_upgrade_bytes": 9}, False),
        (3 * 10**9, {"lower_bound": 0.05}, False),  # what would lose less is too slow for --min-speed
    ],
)
def test_a_budget_that_is_more_than_the_model_needs(
    budget: int, changes: dict[str, Any], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(make_model(tmp_path / "m"), "gguf", "stock", dense(type="q8_0"))
    left = max(0, budget - plan.used_bytes)
    certificate = replace(plan.certificate, bytes_left=left, **changes)
    plan = replace(plan, predicted_loss=0.1, budget_bytes=budget, breakdown={"weights": 1}, certificate=certificate)
    for show in (lambda: show_plan(plan, verbose=False), lambda: show_plans([plan, plan])):
        show()
        shown = capsys.readouterr().out
        assert ("3.00 GB is more than this model needs: its best plan takes" in shown) == said


def test_figures_name_the_text_that_they_are_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predicted and measured ones are of different texts."""
    plan = make_plan(make_model(tmp_path / "m"), "gguf", "stock", dense(type="q8_0"))
    plan = replace(plan, breakdown={"weights": 1})
    for show in (lambda: show_plan(plan, verbose=False), lambda: show_plans([plan, plan])):
        show()
        assert unspaced("on the text that the ranking held out") in unspaced(capsys.readouterr().out)
    show_reports([REPORT])
    assert "on 1,000 tokens of text.txt: perplexity 12.50" in capsys.readouterr().out
    show_reports([REPORT, REPORT])
    assert "measured on 1,000 tokens of text.txt; KL in nats per token\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scope", "beside"),
    [
        ("memory", "(600 B of it for the runtime itself, not in the budget)"),
        ("file", "(1.10 kB of it for caches, buffers and the runtime itself, not in the budget)"),
        ("process", ""),
        ("anonymous", ""),
    ],
)
def test_budget_and_process_say_what_each_counts(
    scope: BudgetScope, beside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a budget of 150 MB beside a process of 187 reads as one that does not hold."""
    show_reports([replace(REPORT, budget_scope=scope)])
    told = capsys.readouterr().out
    assert f"2.00 kB of 2.10 kB planned for its process{beside and f' {beside}'}, " in told
    assert ("not in the budget" in told) == bool(beside)


@pytest.mark.parametrize(("worst", "shown"), [(0.0043, "0.0043"), (0.31872, "0.319"), (4.31e-6, "4.31e-06")])
def test_small_divergences_are_no_zeros(worst: float, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = REPORT.runtimes[0]
    assert runtime.divergence is not None
    divergence = replace(runtime.divergence, mean_kl=worst / 10, kl_999=worst)
    show_reports([replace(REPORT, runtimes=(replace(runtime, divergence=divergence),))])
    told = capsys.readouterr().out
    assert f"KL {worst / 10:.3g} nats per token, 99.9 % of them below {shown}, same" in told, told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-gguf-150MB", "smollm2-gguf-150MB"),
        ("My modèl-für mich", "My-model-fur-mich"),
        ("..a--b. c.git", "a-b.c"),
        ("模型", "model"),
        ("a" * 200, "a" * 96),
    ],
)
def test_the_name_to_publish_under_is_one_that_a_hub_takes(name: str, expected: str) -> None:
    assert hub_name(name) == expected
    check_repository_id(f"owner/{hub_name(name)}")


def test_a_ranking_shows_loss_and_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = make_scores(make_model(tmp_path / "m"))
    whole = CurvePoint(1.0, 2.0, 2.0, divergence=0.0, divergence_with_adapters=0.0)
    cut = CurvePoint(0.8, 2.5, 2.25, divergence=0.6123, divergence_with_adapters=0.4567)
    show_ranking(replace(scores, curve=(whole, cut)), tmp_path / "m.acip")
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].count("with adapters") == 2
    assert ["80%", "12.18", "9.49", "0.6123", "0.4567"] in [line.split() for line in shown.splitlines()]
    # Of a file that was made before divergences were measured, and without adapters.
    show_ranking(replace(scores, curve=(CurvePoint(1.0, 2.0), CurvePoint(0.8, 2.5))), tmp_path / "m.acip")
    shown = capsys.readouterr().out
    assert "KL" not in shown and "with adapters" not in shown
    assert ["80%", "12.18"] in [line.split() for line in shown.splitlines()]
