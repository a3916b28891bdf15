"""The site has every page as its source has it, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
COUNTED = ("table", "tr", "pre", "li", "h1", "h2", "h3", "img")


class _Counter(HTMLParser):
    """Counts elements of a page's article, and collects what a browser would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.counts = dict.fromkeys(COUNTED, 0)
        self.loaded: list[str] = []
        self._in_article = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self._in_article |= tag == "article"
        if self._in_article and tag in self.counts:
            self.counts[tag] += 1
        if tag in ("script", "img", "iframe") and named.get("src"):
            self.loaded.append(str(named["src"]))
        if tag == "link" and named.get("rel") != "canonical" and named.get("href"):
            self.loaded.append(str(named["href"]))

    def handle_endtag(self, tag: str) -> None:
        self._in_article &= tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it as ``make site`` does, elsewhere."""
    out = tmp_path_factory.mktemp("site")
    built = _build(ROOT, out)
    assert built.returncode == 0, built.stderr
    return out


def _build(project: Path, out: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet: strict mode counts the warnings that are shown.
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)


def _page(site: Path, source: str) -> _Counter:
    place = source.removeprefix("docs/") if source.startswith("docs/") else f"repository/{source}"
    return _Counter((site / re.sub(r"\.md$", ".html", re.sub(r"README\.md$", "index.md", place))).read_text("utf-8"))


def _sources() -> list[str]:
    return [file.relative_to(ROOT).as_posix() for file in sorted(ROOT.glob("docs/**/*.md"))] + ["README.md"]


def test_pages_have_what_their_sources_have(site: Path) -> None:
    """What GitHub shows as a table or a list is one here too, though another program reads it."""
    differing = []
    for source in _sources():
        tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / source).read_text(encoding="utf-8"))
        inner = [child for token in tokens for child in token.children or []]
        expected = dict.fromkeys(COUNTED, 0)
        for token in [*tokens, *inner]:
            if token.nesting >= 0 and token.tag in expected and not token.hidden:
                expected[token.tag] += 1
            expected["pre"] += token.type in ("fence", "code_block")
        shown = _page(site, source).counts
        differing += [f"{source}: {expected[t]} {t}, {shown[t]} shown" for t in COUNTED if expected[t] != shown[t]]
    assert differing == []


@pytest.mark.parametrize("link", ["none.md", "../benchmarks/none.json", "#nowhere"])
def test_a_broken_link_is_an_error(link: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text(f"# One page\n[a link]({link})\n", encoding="utf-8")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/site_pages.py", tmp_path / "tools")
    settings, _, _ = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:\n")
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    built = _build(tmp_path, tmp_path / "site")
    assert built.returncode != 0 and link.lstrip("./") in built.stderr


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = [address for page in site.rglob("*.html") for address in _Counter(page.read_text("utf-8")).loaded]
    assert loaded and [address for address in loaded if "//" in address] == []


def test_links_out_of_docs_lead_to_copies(site: Path) -> None:
    assert 'href="../repository/benchmarks/rivals.json"' in (site / "measurements/rivals.html").read_text("utf-8")
    assert (site / "repository/benchmarks/rivals.json").read_bytes() == (ROOT / "benchmarks/rivals.json").read_bytes()
