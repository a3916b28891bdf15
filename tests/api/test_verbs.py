"""The Python interface as a user calls it: text for paths, text for budgets, the README's example."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import acip_export
from acip_export.api import verbs
from acip_export.api.opening import open_model
from tests.support import make_model, make_scores

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_readmes_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there, but for the data: a thousandth of the text is enough to run it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("## Python")[1].split("```python\n")[1].split("```")[0]
    model = make_model(tmp_path / "samples" / "llama", num_hidden_layers=2)
    text = (ROOT / "samples" / "text" / "calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "samples" / "text").mkdir()
    (tmp_path / "samples" / "text" / "calibration.txt").write_text(text[:60_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    planned, written = re.findall(r"([\d,]+) (?:bytes planned|written)", printed)
    assert planned == written
    assert len(re.findall(r"computes what was planned", printed)) == 2
    assert (model / "config.json").is_file() and (tmp_path / "export" / "onnx" / "report.html").is_file()


def test_every_verb_takes_text_paths_and_what_the_others_gave(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", num_hidden_layers=1)
    make_scores(model)
    plan = acip_export.plan(str(model), budget="1MB", format="gguf", scope="file", context=64, types=["q8_0"])
    acip_export.save_plan(plan, tmp_path / "plan.json")
    assert acip_export.load_plan(str(tmp_path / "plan.json")) == plan
    assert plan.budget_bytes == 1_000_000
    scores = acip_export.load_scores(str(next(model.glob("*.acip"))))
    assert (
        acip_export.plan(model, scores, budget=10**6, format="gguf", scope="file", context=64, types=["q8_0"]) == plan
    )
    done = acip_export.export(str(tmp_path / "plan.json"), str(tmp_path / "e"), model=str(model), verify=False)
    assert done is None
    report = acip_export.verify(str(tmp_path / "e"), model=str(model), scores=scores)
    assert report.passed and report.planned_bytes == report.written_bytes


def test_errors_are_those_of_the_package(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", num_hidden_layers=1)
    make_scores(model)
    with pytest.raises(acip_export.UsageError, match="has no unit"):
        acip_export.plan(model, budget="900", format="gguf")
    with pytest.raises(acip_export.InfeasibleBudgetError):
        acip_export.plan(model, budget="1kB", format="gguf")
    with pytest.raises(acip_export.UnsupportedError, match="unknown format"):
        acip_export.plan(model, budget="1MB", format="pdf")
    with pytest.raises(acip_export.InputError):
        acip_export.rank(str(tmp_path / "nothing"), "text.txt")


def test_options_are_read_as_their_flags_are(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", num_hidden_layers=1)
    make_scores(model)
    plan = acip_export.plan(model, budget="2MB", format="gguf", options={"split_max_size": "1MB"}, context=64)
    assert plan.options == {"split_max_size": "1000000"}


@pytest.mark.parametrize("verb", [verbs.rank, verbs.plan, verbs.export, verbs.verify])
def test_every_parameter_is_documented(verb: object) -> None:
    text = inspect.getdoc(verb) or ""
    assert callable(verb)
    for name in inspect.signature(verb).parameters:
        assert re.search(rf"\b{name}\b", text) or name in ("progress",), name


def test_the_hub_is_asked_with_revision_and_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub itself is out of reach of tests: what is asked of its client is compared."""
    import huggingface_hub

    model, asked = make_model(tmp_path / "m", num_hidden_layers=1), {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    opened = open_model("owner/name", revision="v2", token="secret")
    assert opened.path == model
    assert (asked["name"], asked["revision"], asked["token"]) == ("owner/name", "v2", "secret")
