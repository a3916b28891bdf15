"""A report as ``acip-export verify`` writes one, for tests that need no runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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

RUNTIME = RuntimeReport(
    runtime="llama.cpp 1",
    load_seconds=0.5,
    agreement=Agreement(96, 0.01, 1e-6, 1.0, 16, 16),
    perplexity=Perplexity(12.5, 2.5, 0.01, 1000),
    divergence=Divergence(0.1, 0.01, 1.5, 0.2, 0.01, 0.9, 1000),
    memory=MemoryReport(
        2000, 1500, 700, 100, 50, predicted_bytes=2100, predicted_anonymous_bytes=1500, within_budget=True
    ),
    speed=Speed(1000.0, 50.0, 64, 32),
)
REPORT = Report(
    export="export",
    model="tiny",
    format="gguf",
    layout="stock",
    task="causal",
    budget_bytes=3000,
    budget_scope="process",
    planned_bytes=1000,
    written_bytes=1000,
    memory_bytes=1500,
    process_bytes=2100,
    breakdown={"weights": 1000, "kv_cache": 500, "runtime_library": 600},
    predicted_loss=0.2,
    predicted_perplexity=12.0,
    passed=True,
    failures=(),
    notes=(),
    files=(FileReport("model.gguf", 1000, 1000, "0" * 64),),
    structure=Structure(10, 10),
    provenance=Provenance("acip-export 1", "1" * 64, "2" * 64),
    machine={"system": "Linux", "processor": "x86_64", "cores": 2},
    versions={"python": "3"},
    text=TextReport("text.txt", "4" * 64, 10, 100, 1000),
    runtimes=(RUNTIME,),
    bundle_perplexity=Perplexity(12.4, 2.49, 0.01, 1000),
    dense_perplexity=Perplexity(10.0, 2.3, 0.01, 1000),
    tasks={"arc": {"acc": TaskMetric(0.5, None)}},
)


def report_document(**changes: Any) -> dict[str, Any]:
    """``report.json`` with other values of some fields."""
    return replace(REPORT, **changes).to_json()
