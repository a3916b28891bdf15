"""The main job: ``acip-export --budget … --format …``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acip_export.artifacts.bundle import BUNDLE_KIND, bundle_beside
from acip_export.artifacts.export_directory import COMPARISON_KIND, EXPORT_KIND
from acip_export.artifacts.names import COMPARISON_FILE, PLAN_FILE
from acip_export.artifacts.plan import FAR_OFF, Plan, load_plan
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
from acip_export.cli.plan_options import PlanFlags, plan_flags, takes_plan_flags
from acip_export.cli.tables.plan import show_plan, show_plans
from acip_export.cli.tables.report import show_export, show_reports
from acip_export.errors import UsageError, VerificationError
from acip_export.formats.protocol import Companion
from acip_export.formats.registry import export_format, export_formats
from acip_export.io.caches import measured_beside
from acip_export.io.outputs import claim_output
from acip_export.io.stamps import Stamp
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Course
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS
from acip_export.version import __version__

if TYPE_CHECKING:
    from acip_export.artifacts.report import Report
    from acip_export.planning import PlanRequest

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
    keep_bundle: Annotated[
        bool,
        typer.Option("--keep-bundle", help="Write the bundle too, as DIR-bundle.", rich_help_panel=OUTPUT),
    ] = False,
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss",
            help=f"Export at more than {FAR_OFF:g} times the dense perplexity.",
            rich_help_panel=BUDGET,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan, export nothing.\n\n"
            "What a first plan has to measure is kept beside the score file, for the export.",
            rich_help_panel=OUTPUT,
        ),
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

    jobs = _jobs(flags, companions, out, text, names(tasks), cache, force, dry_run, keep_bundle)
    several = len(jobs) > 1
    places = [job.out for job in jobs]
    checkpoint = Checkpoint.open(flags.model)
    opened = pipeline.open_scores(checkpoint, flags.scores)
    known: pipeline.Known = {}
    measured = {} if opened.file is None else measured_beside(opened.file)
    with console.stage_progress(flags.course) as progress:
        plans = [pipeline.plan_export(checkpoint, opened, job.request, progress, known) for job in jobs]
    for job, plan in zip(jobs, plans, strict=True):
        for companion in job.companions:
            companion.check(plan.files)
        if plan.far_off and not (dry_run or accept_loss):
            raise unaccepted_loss(plan)
    wanted = text is not None or (verify and not dry_run)
    measured_on = pipeline.text_to_measure(checkpoint, opened, text, plans[0].serving.context) if wanted else None
    if not json and not several:
        show_plan(plans[0], verbose)
    elif not json:
        show_plans(plans)
    if dry_run:
        if json:
            documents = [plan.to_json() for plan in plans]
            console.print_json(documents if several else documents[0])
        if opened.file is not None:
            _say_what_is_kept(measured_beside(opened.file).items() - measured.items())
        return
    results: list[Result] = []
    failed: list[VerificationError] = []
    place, formats = places[0].parent if several else None, [job.request.format for job in jobs]
    with pipeline.shared_work(place, formats, opened, cache) as (cache, roundings):
        for job, plan in zip(jobs, plans, strict=True):

            def plan_again(nbytes: int, asked: PlanRequest = job.request) -> Plan:
                return pipeline.plan_export(checkpoint, opened, replace(asked, budget_bytes=nbytes), known=known)

            try:
                with console.stage_progress(_course(checkpoint, plan.tune_seconds, verify, keep_bundle)) as progress:
                    export_job = partial(
                        pipeline.export_model,
                        checkpoint,
                        opened,
                        plan,
                        job.out,
                        force,
                        verify,
                        measured_on,
                        names(tasks),
                        timeout,
                        progress=progress,
                        cache=cache,
                        plan_again=plan_again,
                        roundings=roundings,
                        keep_bundle=keep_bundle,
                    )
                    origins = tuple(map(pipeline.task_origin, names(tasks)))
                    asked = (verify, measured_on and measured_on.sha256, origins, keep_bundle)
                    report = pipeline.export_once(roundings, job.out, plan, asked, export_job)
            except VerificationError as error:
                if not several:
                    raise
                failed.append(error)
                continue
            written = {companion: companion.write(job.out, place, force) for companion, place in job.companions.items()}
            # What was planned again is another plan.
            results.append(Result(job, load_plan(job.out / PLAN_FILE), report, written))
    page = pipeline.write_comparison([result.job.out for result in results]) if several and results else None
    if results:
        _show(results, page, json)
    if failed:
        raise VerificationError("\n".join(map(str, failed)))


def _say_what_is_kept(written: Iterable[tuple[Path, Stamp]]) -> None:
    """Name the files that a dry run has left: of minutes of measuring, which the export need not do again."""
    names = sorted(str(file) for file, _ in written)
    if names:
        console.note(f"nothing is exported; what had to be measured is kept for the export in {', '.join(names)}")


def prepare(parameters: dict[str, Any]) -> None:
    """Refuse what a call of the main job would refuse before it opens a model; nothing is written.

    Raises:
        UsageError: flags contradict each other, or an output may not be written. DeviceFileError.
    """
    values = dict(parameters)
    flags, companions = plan_flags(values)
    measured = values["text"], names(values["tasks"]), values["cache"]
    _jobs(flags, companions, values["out"], *measured, values["force"], values["dry_run"], values["keep_bundle"])


@dataclass(frozen=True)
class Job:
    """An export to be made: what is asked, its directory, and those of its companions."""

    request: PlanRequest
    out: Path
    companions: dict[Companion, Path]


def _jobs(
    flags: PlanFlags,
    companions: tuple[str, ...],
    out: Path | None,
    text: Path | None,
    tasks: tuple[str, ...],
    cache: Path | None,
    force: bool,
    dry_run: bool,
    keep_bundle: bool,
) -> list[Job]:
    """Return the exports that are asked for; unless nothing is written, their places are claimed."""
    from acip_export import api as pipeline

    requests = flags.requests()
    pipeline.check_measurable(text, tasks)
    sizes = [default_place(each.format, each.budget_bytes) for each in requests]
    several = len(requests) > 1
    places = [(out or size.parent) / size.name if several else out or size for size in sizes]
    jobs = [
        Job(request, place, _companions(request.format, companions, place))
        for request, place in zip(requests, places, strict=True)
    ]
    if dry_run:
        return jobs
    read = (*flags.inputs, text, cache, *tasks)
    for job in jobs:
        claim_output(job.out, EXPORT_KIND, force, read, flags.model)
        if keep_bundle:
            claim_output(bundle_beside(job.out), BUNDLE_KIND, force, read, flags.model)
        for companion, place in job.companions.items():
            claim_output(place, companion.kind, force, read, flags.model)
    if several:
        claim_output(places[0].parent / COMPARISON_FILE, COMPARISON_KIND, True, read, flags.model)
    return jobs


@dataclass(frozen=True)
class Result:
    """An export that was made. ``written``: of its companions, bytes by file."""

    job: Job
    plan: Plan
    report: Report | None
    written: dict[Companion, dict[str, int]]

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        also = {
            companion.name: {"out": str(self.job.companions[companion]), "files": files}
            for companion, files in self.written.items()
        }
        report = self.report and self.report.to_json()
        return {"out": str(self.job.out), "plan": self.plan.to_json(), "report": report, "companions": also}


def _show(results: list[Result], page: Path | None, json: bool) -> None:
    """Of several exports a table and the page that compares them, of one how to run it."""
    if json:
        documents = [result.to_json() for result in results]
        console.print_json(documents[0] if page is None else documents)
        return
    reports = [result.report for result in results if result.report is not None]
    if reports:
        console.out.print()
    show_reports(reports)
    for result in results:
        if page is None:
            show_export(result.plan, result.job.out)
        for companion, files in result.written.items():
            total, place = sum(files.values()), result.job.companions[companion]
            console.say(f"{total:,} bytes in the {companion.name} format in {place}")
    if page is not None:
        console.say(f"\n{len(results)} exports in {page.parent}, compared in {page}")


def _course(checkpoint: Checkpoint, tune_seconds: float | None, verify: bool, keep_bundle: bool) -> Course:
    """What the stages take: rounding and verifying most, by the bytes of the dense model; processes have to start."""
    share = checkpoint.weight_bytes * _SECONDS_PER_BYTE
    tuned = {} if tune_seconds is None else {"tune": tune_seconds / share}
    written = {"materialize": 4.0, "convert": 1.0} if keep_bundle else {"convert": 5.0}
    shares = {**tuned, **written, **({"verify": 4.0} if verify else {})}
    return Course(shares, (10 if verify else 2) + share * sum(shares.values()))


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
