"""The main job: ``acip-export --budget … --format …``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.export_directory import EXPORT_KIND
from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import FAR_OFF, load_plan
from acip_export.cli import output as console
from acip_export.cli.help import refuse_flags_before
from acip_export.cli.options import (
    BUDGET,
    CHECK,
    MORE,
    OUTPUT,
    Cache,
    Debug,
    Force,
    Json,
    Quiet,
    Tasks,
    Text,
    Timeout,
    Verbose,
    default_place,
    names,
)
from acip_export.cli.plan_options import PlanFlags, takes_plan_flags
from acip_export.cli.tables.plan import show_plan
from acip_export.cli.tables.report import show_export, show_reports
from acip_export.errors import UsageError
from acip_export.formats.protocol import Companion
from acip_export.formats.registry import export_format, export_formats
from acip_export.io.outputs import claim_output
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Course
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS
from acip_export.version import __version__

# Of a share, on two cores of 2024.
_SECONDS_PER_BYTE = 4e-8


def _version(value: bool) -> None:
    if value:
        console.out.print(__version__)
        raise typer.Exit


@takes_plan_flags
def export(
    context_: typer.Context,
    flags: PlanFlags,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Default: export/FORMAT-SIZE.", rich_help_panel=OUTPUT),
    ] = None,
    text: Text = None,
    tasks: Tasks = "",
    timeout: Timeout = DEFAULT_TIMEOUT_SECONDS,
    cache: Cache = None,
    verify: Annotated[
        bool, typer.Option(help="Open the export in its runtime and compare (default).", rich_help_panel=CHECK)
    ] = True,
    companions: tuple[str, ...] = (),
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss",
            help=f"Export at more than {FAR_OFF:g} times the dense perplexity.",
            rich_help_panel=BUDGET,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.", rich_help_panel=OUTPUT)
    ] = False,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show it.", callback=_version, is_eager=True, rich_help_panel=MORE),
    ] = False,
) -> None:
    """Export a ranked model so that it fits a budget. In its directory:

    acip-export rank . --data text.txt

    acip-export --budget 4GB --format gguf

    acip-export --device raspberry-pi-5-8gb

    acip-export --budget 900MB --format onnx --context 2048 --dry-run
    """
    if context_.invoked_subcommand is not None:
        refuse_flags_before(context_.invoked_subcommand, context_, ("quiet", "debug"))
        return
    if not flags.asks:
        typer.echo(context_.get_help())
        raise typer.Exit
    from acip_export import api as pipeline
    from acip_export.planning import unaccepted_loss

    request = flags.request()
    directory = out or default_place(request.format, request.budget_bytes)
    beside = _companions(request.format, companions, directory)
    if not dry_run:
        read = (*flags.inputs, text, cache, *names(tasks))
        claim_output(directory, EXPORT_KIND, force, read, flags.model)
        for companion, place in beside.items():
            claim_output(place, companion.kind, force, read, flags.model)
    checkpoint = Checkpoint.open(flags.model)
    opened = pipeline.open_scores(checkpoint, flags.scores)
    with console.stage_progress() as progress:
        plan = pipeline.plan_export(checkpoint, opened, request, progress)
    for companion in beside:
        companion.check(plan.files)
    wanted = text is not None or (verify and not dry_run)
    measured_on = pipeline.text_to_measure(checkpoint, opened, text, plan.serving.context) if wanted else None
    if plan.far_off and not (dry_run or accept_loss):
        raise unaccepted_loss(plan)
    if not json:
        show_plan(plan, verbose)
    if dry_run:
        if json:
            console.print_json(plan.to_json())
        return
    with console.stage_progress(_course(checkpoint, verify)) as progress:
        report = pipeline.export_model(
            checkpoint,
            opened,
            plan,
            directory,
            force,
            verify,
            measured_on,
            names(tasks),
            timeout,
            types=request.types,
            progress=progress,
            cache=cache,
            plan_again=lambda nbytes: pipeline.plan_export(
                checkpoint, opened, replace(request, budget_bytes=nbytes), progress
            ),
        )
    plan = load_plan(directory / PLAN_FILE)  # it may have been planned again
    written = {companion: companion.write(directory, place, force) for companion, place in beside.items()}
    if json:
        result = {"out": str(directory), "plan": plan.to_json(), "report": report and report.to_json()}
        also = {companion.name: {"out": str(beside[companion]), "files": files} for companion, files in written.items()}
        console.print_json({**result, "companions": also})
        return
    if report is not None:
        console.out.print()
        show_reports([report])
    show_export(plan, directory)
    for companion, files in written.items():
        total = sum(files.values())
        console.say(f"{total:,} bytes in the {companion.name} format in {beside[companion]}")


def _course(checkpoint: Checkpoint, verify: bool) -> Course:
    """What the stages take: rounding and verifying most, by the bytes of the dense model; processes have to start."""
    shares = {"materialize": 4.0, "convert": 1.0, **({"verify": 4.0} if verify else {})}
    seconds = (10 if verify else 2) + checkpoint.weight_bytes * _SECONDS_PER_BYTE * sum(shares.values())
    return Course(shares, seconds)


def _companions(format_name: str, names: tuple[str, ...], directory: Path) -> dict[Companion, Path]:
    """Return the companions that were asked for, with the directories that they are written into.

    Raises:
        UsageError: the format has no such companion.
    """
    known = {companion.name: companion for companion in export_format(format_name).companions}
    for name in names:
        if name not in known:
            having = [each.name for each in export_formats() if name in {c.name for c in each.companions}]
            raise UsageError(f"--{name} goes with  --format {' or '.join(having)}, not {format_name}")
    return {known[name]: directory.parent / f"{directory.name}-{name}" for name in names}
