"""The pages of docs/ describe the schemas: every key in their tables, and no other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from acip_export.artifacts.bundle import Manifest
from acip_export.artifacts.plan import (
    RUNTIME_PARTS,
    Alternative,
    Certificate,
    ContextCost,
    Plan,
    PlannedSpeed,
    Refusal,
    Serving,
    TensorDecision,
)
from acip_export.artifacts.report import (
    Agreement,
    Divergence,
    FileReport,
    MemoryReport,
    Perplexity,
    Provenance,
    Report,
    RuntimeReport,
    Speed,
    Structure,
    TaskMetric,
    TextReport,
)
from acip_export.artifacts.rounding_errors import RoundingErrors
from acip_export.artifacts.scores import CurvePoint, Metadata, ModuleEntry, RankedModel, RankedOn
from acip_export.check.config import EntryTable
from acip_export.check.lock import Lock, LockedFile, LockedModel
from acip_export.check.quality import Quality
from acip_export.devices import ChipTable, DeviceTable, ModelTable, ReportTable, Sources
from acip_export.formats.registry import export_formats

DOCS = Path(__file__).parents[2] / "docs"
HEAD = {"artifact", "version"}


def keys_of(*kinds: type) -> set[str]:
    return {
        name
        for kind in kinds
        for name in (
            [field.name for field in dataclasses.fields(kind)]
            if dataclasses.is_dataclass(kind)
            else kind.__struct_encode_fields__  # type: ignore[attr-defined]
        )
    }


def section(page: str, title: str) -> str:
    """The text under a heading; without a title, what is above the first one."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return parts[0] if not title else dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def rows(page: str, title: str) -> list[list[str]]:
    lines = [line for line in section(page, title).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|", 1)] for line in lines]


def words(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


TABLES = {
    ("plan.md", ""): HEAD | keys_of(Plan),
    ("plan.md", "A decision"): keys_of(TensorDecision),
    ("report.md", ""): HEAD | keys_of(Report),
    ("report.md", "A runtime"): keys_of(RuntimeReport),
    ("bundle.md", "`bundle.json`"): HEAD | keys_of(Manifest),
    ("score-file.md", "Container"): keys_of(Metadata),
    ("rounding-errors.md", ""): HEAD | keys_of(RoundingErrors),
    ("check.md", "Configuration"): keys_of(EntryTable),
    ("check.md", "The lock file, version 2"): HEAD | keys_of(Lock, LockedModel),
    ("devices.md", "Your own"): keys_of(DeviceTable),
}


@pytest.mark.parametrize(("page", "title"), TABLES)
def test_every_key_is_documented_and_every_documented_key_is_there(page: str, title: str) -> None:
    documented = [key for cell, _ in rows(page, title) for key in re.findall(r"`(\w+)`", cell)]
    assert len(documented) == len(set(documented))
    assert set(documented) == TABLES[page, title]


PARTS = {
    ("plan.md", "", "serving"): keys_of(Serving),
    ("plan.md", "", "certificate"): keys_of(Certificate, Alternative, Refusal, ContextCost),
    ("plan.md", "", "breakdown"): {*RUNTIME_PARTS},
    ("plan.md", "", "options"): {option.name for each in export_formats() for option in each.options},
    ("report.md", "", "files"): keys_of(FileReport),
    ("report.md", "", "structure"): keys_of(Structure),
    ("report.md", "", "provenance"): keys_of(Provenance),
    ("report.md", "", "text"): keys_of(TextReport),
    ("report.md", "", "tasks"): keys_of(TaskMetric),
    ("report.md", "A runtime", "agreement"): keys_of(Agreement),
    ("report.md", "A runtime", "divergence"): keys_of(Divergence),
    ("report.md", "A runtime", "memory"): keys_of(MemoryReport),
    ("report.md", "A runtime", "speed"): keys_of(Speed),
    ("score-file.md", "Container", "model"): keys_of(RankedModel),
    ("score-file.md", "Container", "data"): keys_of(RankedOn),
    ("check.md", "The lock file, version 2", "files"): keys_of(LockedFile),
    ("check.md", "The lock file, version 2", "quality"): keys_of(Quality),
    ("devices.md", "Your own", "source"): keys_of(Sources),
    ("devices.md", "Speeds that people reported", "model"): keys_of(ModelTable),
    ("devices.md", "Speeds that people reported", "chip"): keys_of(ChipTable),
    ("devices.md", "Speeds that people reported", "reports"): keys_of(ReportTable),
    ("plan.md", "", "speed"): keys_of(PlannedSpeed),
}


@pytest.mark.parametrize(("page", "title", "key"), PARTS)
def test_every_key_of_a_part_stands_in_its_row(page: str, title: str, key: str) -> None:
    described = next(text for cell, text in rows(page, title) if f"`{key}`" in cell)
    assert PARTS[page, title, key] - words(described) == set()


def test_what_stands_in_running_text() -> None:
    assert keys_of(Perplexity) <= words(section("report.md", "A runtime"))
    described = {cell.strip("`"): set(re.findall(r"\w+", text)) for cell, text in rows("score-file.md", "Container")}
    assert keys_of(CurvePoint) <= described["curve"]
    assert keys_of(ModuleEntry) <= described["modules"]
