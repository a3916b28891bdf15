"""What ``make demo`` runs: rank the sample model once, export it at three budgets in both formats, run every export.

    python -m samples.demo                      prints the table
    python -m samples.demo --update-readme      also writes benchmarks/demo.json and the table in samples/README.md

The score file is kept in .demo/, so that a second run shows what a new size costs: planning, writing, verifying.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import acip_export
from acip_export.api import evaluation_text, export_model, plan_export, write_report
from acip_export.artifacts.report import Report
from acip_export.artifacts.scores import ScoreFile, load_scores
from acip_export.cli import output as console
from acip_export.cli.tables.report import show_reports
from acip_export.errors import ScoreFileError
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import PlanRequest
from acip_export.units import format_bytes, parse_bytes
from samples.marked import with_marked

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
WORK = ROOT / ".demo"
CONTEXT = 256
BUDGETS = ("6MB", "4.5MB", "3.5MB")
MEASURED_TOKENS = 8_192
TABLE = "demo table"


def ranked(checkpoint: Checkpoint) -> ScoreFile:
    """The score file kept from an earlier run, or a new one."""
    file = WORK / f"{checkpoint.name}.acip"
    if file.is_file():
        try:
            scores = load_scores(file)
            scores.check_model(checkpoint)
        except ScoreFileError as error:
            console.note(f"{error}\nranking again")
        else:
            console.note(f"score file of an earlier run: {file.relative_to(ROOT)}")
            return scores
    started = time.perf_counter()
    with console.stage_progress() as bars:
        acip_export.rank(checkpoint, SAMPLES / "text" / "calibration.txt", out=file, force=True, progress=bars)
    console.note(f"ranked in {time.perf_counter() - started:.0f} s")
    return load_scores(file)


def export_all(checkpoint: Checkpoint, scores: ScoreFile) -> list[Report]:
    text = evaluation_text(checkpoint.path, SAMPLES / "text" / "evaluation.txt", CONTEXT, MEASURED_TOKENS)
    reports = []
    for fmt, layout, types in (("gguf", "stock", ()), ("gguf", "lora", ("q8_0",)), ("onnx", "factored", ())):
        for budget in BUDGETS:
            request = PlanRequest(fmt, parse_bytes(budget), layout=layout, types=types, context=CONTEXT)
            plan = plan_export(checkpoint, scores, request)
            with console.stage_progress() as bars:
                report = export_model(
                    checkpoint,
                    scores,
                    plan,
                    WORK / f"{fmt}-{layout}-{budget}",
                    force=True,
                    text=text,
                    progress=bars,
                )
            assert report is not None
            reports.append(report)
            show_reports([report])
        made = [WORK / f"{fmt}-{layout}-{budget}" for budget in BUDGETS]
        for directory in made:
            # Each page shows what was measured at the other sizes, too.
            write_report(directory, checkpoint, scores, [other for other in made if other != directory])
    return reports


def table(rows: list[dict[str, Any]]) -> str:
    """The demo's figures as a Markdown table."""
    lines = [
        "| export | budget (memory) | planned bytes | written bytes | perplexity in the runtime | dense | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['export']} | {format_bytes(r['budget_bytes'])} | {r['planned_bytes']:,} | {r['written_bytes']:,} "
        f"| {r['perplexity']:.2f} | {r['dense_perplexity']:.2f} | {r['tokens_per_second']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def figures(report: Report) -> dict[str, Any]:
    first = report.runtimes[0]
    assert first.perplexity is not None
    assert report.dense_perplexity is not None
    assert first.speed is not None
    return {
        "export": f"{report.format}, {report.layout}",
        "runtime": first.runtime,
        "budget_bytes": report.budget_bytes,
        "memory_bytes": report.memory_bytes,
        "planned_bytes": report.planned_bytes,
        "written_bytes": report.written_bytes,
        "perplexity": first.perplexity.perplexity,
        "dense_perplexity": report.dense_perplexity.perplexity,
        "tokens": first.perplexity.tokens,
        "tokens_per_second": first.speed.decode,
    }


def update_readme(rows: list[dict[str, Any]], model: str) -> None:
    packages = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "gguf", "xllamacpp")
    record = {
        "model": model,
        "context": CONTEXT,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {name: version(name) for name in packages},
        "rows": rows,
    }
    (ROOT / "benchmarks" / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    page = SAMPLES / "README.md"
    page.write_text(with_marked(page.read_text(encoding="utf-8"), TABLE, table(rows)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SAMPLES / "llama")
    parser.add_argument("--update-readme", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    checkpoint = Checkpoint.open(arguments.model)
    WORK.mkdir(exist_ok=True)
    for old in WORK.glob(".*"):
        shutil.rmtree(old, ignore_errors=True)
    reports = export_all(checkpoint, ranked(checkpoint))
    console.out.print()
    show_reports(reports)
    if not all(report.passed and report.written_bytes == report.planned_bytes for report in reports):
        raise SystemExit("an export is not what was planned")
    if arguments.update_readme:
        update_readme([figures(report) for report in reports], checkpoint.name)
    console.out.print(
        f"{len(reports)} exports planned, written and run in {time.perf_counter() - started:.0f} s; "
        f"they are in {WORK.relative_to(ROOT)}/, each with its report.html"
    )


if __name__ == "__main__":
    main()
