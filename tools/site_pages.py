"""Add to the site what pages of docs/ link to outside of it; mkdocs calls these functions (hooks in mkdocs.yml).

Pages are written for readers of the repository: a link to ../benchmarks/plan.json leads there. In the site, docs/ is
the root and everything else lies under repository/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_ELSEWHERE = "repository/"
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the linked files, and those that they link to in turn."""
    waiting = [_place(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for _, target, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            linked = _resolve(page, target)
            if linked in seen or linked.startswith("docs/") or not (ROOT / linked).is_file():
                continue
            seen.add(linked)
            files.append(File.generated(config, _address(linked), abs_src_path=str(ROOT / linked)))
            if linked.endswith(".md"):
                waiting.append(linked)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their files lie in the site; one to a file that is not there is an error of mkdocs's."""
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        address = _address(_resolve(_place(page.file.src_uri), target))
        return f"{before}{posixpath.relpath(address, here or '.')}{after}"

    return _LINK.sub(moved, markdown)


def _place(address: str) -> str:
    """Return the path in the repository."""
    return address.removeprefix(_ELSEWHERE) if address.startswith(_ELSEWHERE) else f"docs/{address}"


def _address(place: str) -> str:
    """Return the path in the site's sources."""
    return place.removeprefix("docs/") if place.startswith("docs/") else _ELSEWHERE + place


def _resolve(page: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
