"""An export's directory: the files of its plan, and the papers beside them, which no budget counts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from acip_export.artifacts.document import header_of, listed_files
from acip_export.artifacts.names import (
    CARD_FILE,
    MANIFEST_FILE,
    MARK_FILE,
    PAGE_FILE,
    PLAN,
    PLAN_FILE,
    REPORT,
    REPORT_FILE,
    TUNED,
    TUNED_FILE,
)
from acip_export.artifacts.plan import PLAN_KIND, Plan, load_plan
from acip_export.errors import PlanFileError
from acip_export.io.inputs import read_input
from acip_export.io.outputs import DirectoryKind, FileKind, Output, claim_output, json_kind, safetensors_kind

REPORT_KIND = json_kind(REPORT.noun, REPORT.artifact)
# The title of the page, and the front matter of the card.
PAGE_KIND = FileKind("a report's page", re.compile(rb"(?si)<!doctype html>.*acip-export</title>"))
COMPARISON_KIND = FileKind(
    "a comparison of exports", re.compile(rb"(?si)<!doctype html>.*exports compared \xc2\xb7 acip-export</title>")
)
CARD_KIND = FileKind("a model card", re.compile(rb'(?s)---\n.*^quantized_by: "acip-export"$', re.MULTILINE))
_UNVERIFIED = "acip-export: this export is not verified."
MARK_KIND = FileKind("a mark of acip-export", re.compile(re.escape(_UNVERIFIED.encode())))
TUNED_KIND = safetensors_kind(TUNED.noun, TUNED.artifact)
# Bytes of a plan within which it says what it is.
_BEGINNING = 100
_PAPERS = {REPORT_FILE: REPORT_KIND, PAGE_FILE: PAGE_KIND, CARD_FILE: CARD_KIND, MARK_FILE: MARK_KIND}


def _contents(directory: Path) -> Mapping[str, int | FileKind]:
    files = listed_files(directory / PLAN_FILE, PLAN)
    return {**files, PLAN_FILE: PLAN_KIND, TUNED_FILE: TUNED_KIND, **_PAPERS} if files else {}


def is_unverified(export: Path) -> bool:
    """Whether an export is marked: its last verification failed, or did not come to its end."""
    return (export / MARK_FILE).is_file()


def _to_finish(export: Path) -> str:
    if not is_unverified(export):
        return ""
    verify = shlex.join(["acip-export", "verify", str(export)])
    return f"and is not verified: an earlier run was stopped before, or it failed. Verify it with\n  {verify}"


EXPORT_KIND = DirectoryKind("an export", _contents, _to_finish)


def claim_papers(export: Path, inputs: Iterable[str | PathLike[str] | None] = ()) -> dict[str, Output]:
    """The report, the page, the card and the mark of an export, by name: written anew without asking, if they are ours.

    Raises:
        UsageError: one of them is somebody else's, or an input; see :func:`acip_export.io.outputs.claim_output`.
    """
    read = tuple(inputs)
    return {name: claim_output(export / name, kind, True, read, export) for name, kind in _PAPERS.items()}


def export_of(path: Path) -> Path:
    """Return the directory of an export that is named by itself, or by the plan or the report in it."""
    return path.parent if path.name in (PLAN_FILE, REPORT_FILE) else path


def is_export(directory: Path) -> bool:
    """Whether there is a plan whose largest file is there: beside a model, a plan may lie alone. A bundle is none."""
    try:
        data = read_input(directory / PLAN_FILE, PlanFileError)
        if header_of(data, PLAN_FILE, PlanFileError).artifact != PLAN.artifact:
            return False
    except PlanFileError:
        return False
    planned = listed_files(directory / PLAN_FILE, PLAN)
    there = not planned or (directory / max(planned, key=lambda name: planned[name])).is_file()
    return there and not (directory / MANIFEST_FILE).is_file()


def exports_in(directory: Path) -> list[Path]:
    """Return the exports that lie side by side in a directory, as several budgets in one call leave them."""
    inside = sorted(each.parent for each in directory.glob(f"*/{PLAN_FILE}"))
    return [each for each in inside if not each.name.startswith(".") and (is_export(each) or _is_cut_off(each))]


def _is_cut_off(directory: Path) -> bool:
    """Whether there is a plan that says at its beginning that it is one, and is no JSON: of a damaged export."""
    try:
        data = read_input(directory / PLAN_FILE, PlanFileError)
    except PlanFileError:
        return False
    if PLAN.artifact.encode() not in data[:_BEGINNING]:
        return False
    try:
        header_of(data, PLAN_FILE, PlanFileError)
    except PlanFileError:
        return True
    return False


def load_export_plan(export: Path) -> Plan:
    """Read the plan of an export; of what is none, say so rather than that a file is missing in it.

    Raises:
        PlanFileError: no directory, or one without a readable plan.
    """
    if (export / PLAN_FILE).is_file():
        return load_plan(export / PLAN_FILE)
    what = "is a file" if export.is_file() else f"has no {PLAN_FILE}" if export.is_dir() else "does not exist"
    inside = exports_in(export)
    instead = (
        f"the exports in it: {', '.join(map(str, inside))}"
        if inside
        else "name the directory that  acip-export --budget … --format …  wrote"
    )
    raise PlanFileError(f"{export} is no export: it {what}; {instead}")


def mark_unverified(export: Path, why: str) -> None:
    """Leave a file in an export that says, to whoever lists it, that nothing is proven, why, and what to do."""
    with claim_papers(export)[MARK_FILE].new_file() as file:
        file.write_text(f"{_UNVERIFIED}\n\n{why}\n", encoding="utf-8")


def settle_mark(export: Path, failures: Sequence[str]) -> None:
    """Remove the mark of an export that was verified, or write what failed into it."""
    if failures:
        mark_unverified(export, "\n".join(failures))
    else:
        mark = claim_papers(export)[MARK_FILE]
        with mark.held():  # what a killed process has left of it goes as well
            mark.place.unlink(missing_ok=True)
