"""What the documentation says is what there is."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from acip_export.version import __version__
from tests.support import Run

ROOT = Path(__file__).parent.parent
DOCS = sorted(file.relative_to(ROOT).as_posix() for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize(("script", "page"), [("generate_cli", "docs/cli.md"), ("generate_api", "docs/api.md")])
def test_references_are_up_to_date(script: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    generate = importlib.import_module(script)
    assert ROOT / page == generate.FILE
    stale = generate.FILE.read_text(encoding="utf-8") != generate.reference()
    assert not stale, f"{page} is not what commands and docstrings say; run  make docs"


def _links(text: str) -> list[str]:
    tokens = [c for token in MarkdownIt("commonmark").enable("table").parse(text) for c in token.children or []]
    return [str(t.attrs.get("href", t.attrs.get("src"))) for t in tokens if t.type in ("link_open", "image")]


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name: str) -> None:
    file = ROOT / name
    for link in _links(file.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        there = (file.parent / target).resolve() if target else file
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, link


def test_the_first_hour_estimates_what_ranking_does(model: Path, run: Run) -> None:
    """The stages that the guide shows are those that the command prints."""
    page = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
    block = page.partition("ranking with fisher takes")[2].partition("```")[0]
    shown = re.findall(r"^  (.+?) +\d+ (?:s|min)$", block, re.MULTILINE)
    printed = run("rank", model, "--data", "self", "--algorithm", "fisher", "--estimate", "--json")
    assert shown == [stage for stage in json.loads(printed.out)["seconds"] if stage != "total"]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link).resolve() for link in _links(index)}
    pages = {name for name in DOCS if name.startswith("docs/")} - {"docs/README.md"}
    missing = sorted(name for name in pages if (ROOT / name).resolve() not in linked)
    assert missing == [], "link these pages in docs/README.md"


def test_every_page_is_of_one_kind() -> None:
    """Index and site sort the pages alike; figures that a benchmark wrote are linked from measurements only."""
    index = re.split(r"^## (.*)$", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    nav = re.split(r"^  - (.*):$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    sections = dict(zip(nav[::2], nav[1::2], strict=True))
    kinds: dict[str, str] = {}
    for kind, text in zip(index[::2], index[1::2], strict=True):
        linked = {link for link in _links(text) if not link.startswith("../")}
        assert linked == set(re.findall(r": (?!repository/)(\S+\.md)$", sections[kind], re.MULTILINE)), kind
        assert linked.isdisjoint(kinds)
        kinds |= dict.fromkeys(linked, kind)
    with_figures = {page for page in kinds if "/benchmarks/" in (ROOT / "docs" / page).read_text(encoding="utf-8")}
    assert {kinds[page] for page in with_figures - {"memory.md", "speed.md"}} == {"Measurements"}


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "acip_export.version.__version__"}
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [__version__]
