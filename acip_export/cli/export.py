"""The main job: ``acip-export --budget … --format …``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Cache, Force, Json, Tasks, Text, Timeout, Verbose, names
from acip_export.cli.plan_options import PlanFlags, takes_plan_flags
from acip_export.cli.tables.plan import show_plan
from acip_export.cli.tables.report import show_export, show_reports
from acip_export.errors import UsageError
from acip_export.io.atomic import refuse_existing
from acip_export.model.checkpoint import Checkpoint
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS
from acip_export.version import __version__


def _version(value: bool) -> None:
    if value:
        console.out.print(__version__)
        raise typer.Exit


@takes_plan_flags
def export(
    context_: typer.Context,
    flags: PlanFlags,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: ./export/FORMAT.")] = None,
    text: Text = None,
    tasks: Tasks = "",
    timeout: Timeout = DEFAULT_TIMEOUT_SECONDS,
    cache: Cache = None,
    verify: Annotated[bool, typer.Option(help="Open the export in its runtime and compare.")] = True,
    ort: Annotated[bool, typer.Option("--ort", help="ONNX: also OUT-ort, for reduced onnxruntime builds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Export a ranked model so that it fits a budget.

    Run inside a model directory that has a score file:

        acip-export rank . --data text.txt

        acip-export --budget 4GB --format gguf

        acip-export --device raspberry-pi-5-8gb

        acip-export --budget 900MB --format onnx --context 2048 --dry-run
    """
    if context_.invoked_subcommand is not None:
        return
    if not flags.asks:
        console.out.print(context_.get_help())
        raise typer.Exit
    from acip_export import api as pipeline

    request = flags.request()
    target = out or Path("export") / request.format
    ort_target = target.with_name(f"{target.name}-ort")
    if ort and request.format != "onnx":
        raise UsageError(f"--ort goes with  --format onnx, not {request.format}")
    if not dry_run:
        refuse_existing(target, force)
        if ort:
            refuse_existing(ort_target, force)
    checkpoint = Checkpoint.open(flags.model)
    opened = pipeline.open_scores(checkpoint, flags.scores)
    with console.stage_bars() as progress:
        plan = pipeline.plan_export(checkpoint, opened, request, progress)
    if ort:
        from converters.onnx.ort_format import check_size

        check_size(plan.files)
    measured_on = None if text is None else pipeline.evaluation_text(checkpoint.path, text, plan.serving.context)
    if not json:
        show_plan(plan, verbose)
    if dry_run:
        if json:
            console.print_json(plan.to_json())
        return
    with console.stage_bars() as progress:
        report = pipeline.export_model(
            checkpoint,
            opened,
            plan,
            target,
            force,
            verify,
            measured_on,
            names(tasks),
            timeout,
            types=request.types,
            progress=progress,
            cache=cache,
        )
    ort_files = None
    if ort:
        from converters.onnx.ort_format import write_ort

        ort_files = write_ort(target, ort_target, force)
    if json:
        result = {"out": str(target), "plan": plan.to_json(), "report": report and report.to_json()}
        console.print_json({**result, "ort": ort_files and {"out": str(ort_target), "files": ort_files}})
        return
    if report is not None:
        console.out.print()
        show_reports([report])
    show_export(plan, target)
    if ort_files:
        console.out.print(f"{sum(ort_files.values()):,} bytes in the ORT format in {ort_target}", markup=False)
