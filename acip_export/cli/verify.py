"""``acip-export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Model, Quiet, Scores, Tasks, Text, Timeout, names
from acip_export.cli.tables.report import show_reports
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS


def verify(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export directory.")],
    model: Model = ".",
    scores: Scores = None,
    bundle: Annotated[Path | None, typer.Option(help="Its bundle. Default: its tensors are made again.")] = None,
    text: Text = None,
    tasks: Tasks = "",
    timeout: Timeout = DEFAULT_TIMEOUT_SECONDS,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove an export in its real runtime, and write report.json: files, logits, quality, memory, time, speed.

    acip-export verify export/gguf-4GB --text held-out.txt
    """
    from acip_export import api as pipeline
    from acip_export.verification.export import require_passed

    with console.stage_progress() as progress:
        report = pipeline.verify_directory(export_dir, model, scores, bundle, text, names(tasks), timeout, progress)
    plan = load_plan(export_dir / PLAN_FILE)
    checkpoint, opened = pipeline.ranked_model_of(plan, model, scores)
    pipeline.write_report(export_dir, checkpoint, opened)
    if json:
        console.print_json(report.to_json())
    else:
        show_reports([report])
    require_passed(report)
