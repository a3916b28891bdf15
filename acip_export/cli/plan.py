"""``acip-export plan``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.names import SWEEP
from acip_export.artifacts.plan import PLAN_KIND, save_plan
from acip_export.cli import output as console
from acip_export.cli.options import Debug, Force, Json, Quiet, Verbose
from acip_export.cli.plan_options import PlanFlags, takes_plan_flags
from acip_export.cli.tables.plan import show_plan
from acip_export.io.outputs import claim_output, json_kind
from acip_export.model.checkpoint import Checkpoint

_SWEEP_KIND = json_kind(SWEEP.noun, SWEEP.artifact)


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
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show where every byte of a budget would go.

    acip-export plan --budget 900MB --format gguf -o plan.json

    acip-export plan --device iphone-15-pro-8gb --context 8192

    acip-export plan --sweep --format gguf -o sweep.svg

    acip-export plan --sweep --format onnx --types 'int8;int4' -o types.png

    acip-export plan --sweep --format gguf --context '2k;8k;32k' --cache-type auto
    """
    from acip_export import api as pipeline

    if sweep:
        _sweep(flags, out, json, force)
        return
    request = flags.request()
    if out is not None:
        claim_output(out, PLAN_KIND, force, flags.inputs, flags.model)
    checkpoint = Checkpoint.open(flags.model)
    with console.stage_progress(flags.course) as progress:
        made = pipeline.plan_export(checkpoint, pipeline.open_scores(checkpoint, flags.scores), request, progress)
    if out is not None:
        save_plan(made, out, force)
    if json:
        console.print_json(made.to_json())
    else:
        show_plan(made, verbose)


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
    with console.stage_progress(flags.course) as progress:
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
        console.say(line)
    console.say(f"drawn in {drawing}, figures in {drawing and drawing.with_suffix('.json')}")
