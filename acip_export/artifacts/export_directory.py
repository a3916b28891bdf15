"""An export's directory: the files of its plan, and the papers beside them, which no budget counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

from acip_export.artifacts.plan import PLAN_KIND
from acip_export.io.outputs import DirectoryKind, FileKind, Output, claim_output, json_kind, json_object, listed_sizes

PLAN_FILE, REPORT_FILE, PAGE_FILE, CARD_FILE = "plan.json", "report.json", "report.html", "README.md"

REPORT_KIND = json_kind("a report", "acip-report")
# The title of the page, and the front matter of the card.
PAGE_KIND = FileKind("a report's page", re.compile(rb"(?si)<!doctype html>.*acip-export</title>"))
CARD_KIND = FileKind("a model card", re.compile(rb'(?s)---\n.*^quantized_by: "acip-export"$', re.MULTILINE))
_PAPERS = {REPORT_FILE: REPORT_KIND, PAGE_FILE: PAGE_KIND, CARD_FILE: CARD_KIND}


def _contents(directory: Path) -> Mapping[str, int | FileKind]:
    plan = json_object(directory / PLAN_FILE)
    if plan.get("artifact") != "acip-plan":
        return {}
    return {**listed_sizes(plan.get("files")), PLAN_FILE: PLAN_KIND, **_PAPERS}


EXPORT_KIND = DirectoryKind("an export", _contents)


def claim_papers(export: Path, inputs: Iterable[str | PathLike[str] | None] = ()) -> dict[str, Output]:
    """The report, the page and the card of an export, by name: written anew without asking, if they are ours.

    Raises:
        UsageError: one of them is somebody else's, or an input; see :func:`acip_export.io.outputs.claim_output`.
    """
    read = tuple(inputs)
    return {name: claim_output(export / name, kind, True, read, export) for name, kind in _PAPERS.items()}
