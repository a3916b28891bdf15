"""The main job, ``acip-export --budget … --format …``, and ``acip-export plan``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.export_directory import EXPORT_KIND
from acip_export.artifacts.plan import PLAN_KIND, save_plan
from acip_export.cli import output as console
from acip_export.cli.options import (
    Cache,
    Force,
    Json,
    PlanFlags,
    Tasks,
    Text,
    Timeout,
    Verbose,
    names,
    takes_plan_flags,
)
from acip_export.errors import UsageError
from acip_export.io.outputs import claim_output, json_kind
from acip_export.model.checkpoint import Checkpoint
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS
from acip_export.version import __version__

_SWEEP_KIND = json_kind("a sweep", "acip-sweep")


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
    if ort and request.format != "onnx":
        raise UsageError(f"--ort goes with  --format onnx, not {request.format}")
    if not dry_run:
        read = (*flags.inputs, text, cache, *names(tasks))
        claim_output(target, EXPORT_KIND, force, read, flags.model)
        if ort:
            from converters.onnx.ort_format import ORT_KIND, ort_directory

            claim_output(ort_directory(target), ORT_KIND, force, read, flags.model)
    checkpoint = Checkpoint.open(flags.model)
    opened = pipeline.open_scores(checkpoint, flags.scores)
    with console.stage_bars() as progress:
        plan = pipeline.plan_export(checkpoint, opened, request, progress)
    if ort:
        from converters.onnx.ort_format import check_size

        check_size(plan.files)
    measured_on = None if text is None else pipeline.evaluation_text(checkpoint.path, text, plan.serving.context)
    if not json:
        console.show_plan(plan, verbose)
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
    ort_target, ort_files = None, None
    if ort:
        from converters.onnx.ort_format import ort_directory, write_ort

        ort_target = ort_directory(target)
        ort_files = write_ort(target, ort_target, force)
    if json:
        result = {"out": str(target), "plan": plan.to_json(), "report": report and report.to_json()}
        console.print_json({**result, "ort": ort_files and {"out": str(ort_target), "files": ort_files}})
        return
    if report is not None:
        console.out.print()
        console.show_reports([report])
    console.show_export(plan, target)
    if ort_files:
        console.out.print(f"{sum(ort_files.values()):,} bytes in the ORT format in {ort_target}", markup=False)


@takes_plan_flags
def plan(
    flags: PlanFlags,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Every size instead of one: quality against bytes, drawn and as JSON.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the plan to this file; the drawing of a sweep (.png or .svg)."),
    ] = None,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Show where every byte of a budget would go.

    acip-export plan --budget 900MB --format gguf -o plan.json

    acip-export plan --device iphone-15-pro-8gb --context 8192

    acip-export plan --sweep --format gguf -o sweep.svg

    acip-export plan --sweep --format onnx --types 'int8;int4' -o types.png
    """
    from acip_export import api as pipeline

    if sweep:
        _sweep(flags, out, json, force)
        return
    request = flags.request()
    if out is not None:
        claim_output(out, PLAN_KIND, force, flags.inputs, flags.model)
    checkpoint = Checkpoint.open(flags.model)
    with console.stage_bars() as progress:
        made = pipeline.plan_export(checkpoint, pipeline.open_scores(checkpoint, flags.scores), request, progress)
    if out is not None:
        save_plan(made, out, force)
    if json:
        console.print_json(made.to_json())
    else:
        console.show_plan(made, verbose)


def _sweep(flags: PlanFlags, out: Path | None, json: bool, force: bool) -> None:
    """Compute the curves, then print them as JSON, or draw them and write the JSON beside the drawing."""
    from acip_export import api as pipeline
    from acip_export.cli import sweep_plot

    requests = flags.sweep_requests()
    drawing = None if json and out is None else out or Path("sweep.png")
    if drawing is not None:
        sweep_plot.check_suffix(drawing)
        for file, kind in ((drawing, sweep_plot.DRAWING_KIND), (drawing.with_suffix(".json"), _SWEEP_KIND)):
            claim_output(file, kind, force, flags.inputs, flags.model)
        sweep_plot.require_matplotlib()
    checkpoint = Checkpoint.open(flags.model)
    scores = pipeline.open_scores(checkpoint, flags.scores)
    with console.stage_bars() as progress:
        lines = pipeline.sweep_sizes(checkpoint, scores, requests, progress)
    document = pipeline.sweep_document(checkpoint, scores, requests, lines)
    if drawing is not None:
        title = f"{checkpoint.name}: size and predicted quality"
        scope = requests[0][1].budget_scope
        sweep_plot.draw(lines, title, scope, scores.loss_unit, drawing, force)
        with claim_output(drawing.with_suffix(".json"), _SWEEP_KIND, force).new_file() as temporary:
            temporary.write_text(dumps(document, indent=1) + "\n", encoding="utf-8")
    if json:
        console.print_json(document)
        return
    for line in sweep_plot.summary(lines):
        console.out.print(line, markup=False)
    console.out.print(f"drawn in {drawing}, figures in {drawing and drawing.with_suffix('.json')}", markup=False)
