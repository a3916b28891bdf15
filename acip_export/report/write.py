"""Writing the page and the card into an export's directory."""

from __future__ import annotations

from pathlib import Path

from acip_export.artifacts.export_directory import claim_papers
from acip_export.artifacts.names import CARD_FILE, PAGE_FILE
from acip_export.formats.registry import export_format
from acip_export.report import card, html
from acip_export.report.page import Page


def write_papers(page: Page, directory: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``README.md``, each whole or not at all; earlier ones of ours are replaced."""
    papers = claim_papers(directory)
    plan = page.own.plan
    written_as = export_format(plan.format)
    template = written_as.chat_template(directory)
    commands = written_as.run_commands(plan, Path(), template)
    written = directory / PAGE_FILE, directory / CARD_FILE
    texts = html.render(page, commands), card.render(page, commands, template is not None)
    for file, text in zip(written, texts, strict=True):
        with papers[file.name].new_file() as temporary:
            temporary.write_text(text, encoding="utf-8")
    return written
