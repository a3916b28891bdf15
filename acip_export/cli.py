"""The command line. Reads flags, calls :mod:`acip_export.pipeline`, draws with :mod:`acip_export.console`."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from acip_export import console
from acip_export.checkpoint import Checkpoint
from acip_export.commands import check, inspect
from acip_export.errors import AcipError, UsageError
from acip_export.files import refuse_existing
from acip_export.formats import formats_of
from acip_export.plans import load_plan, save_plan
from acip_export.targets import TARGETS
from acip_export.units import parse_bytes
from acip_export.version import __version__

if TYPE_CHECKING:
    from acip_export.plan import PlanRequest

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="acip-export",
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option("--model", "-m", help="Model directory or Hugging Face id.", show_default=True)]
Scores = Annotated[Path | None, typer.Option(help="Score file. Default: the *.acip beside the model.")]
Budget = Annotated[str | None, typer.Option(help="Bytes with a unit: 4GB, 900MB, 2GiB.")]
Scope = Annotated[
    Literal["memory", "file"],
    typer.Option("--budget-scope", help="What the budget covers: all that the runtime holds, or the files."),
]
Format = Annotated[str | None, typer.Option("--format", "-f", help="Target: gguf or onnx.")]
LayoutName = Annotated[str | None, typer.Option("--layout", help="Layout of the target; see  acip-export formats.")]
Types = Annotated[str, typer.Option("--types", help="Types to choose from, by comma. Default: the target's.")]
Context = Annotated[int | None, typer.Option(help="Tokens of KV cache. Default: the model's, at most 4096.")]
CacheType = Annotated[str | None, typer.Option(help="Type of the KV cache.")]
PromptBatch = Annotated[int | None, typer.Option(help="Prompt tokens processed together. Default: suits the budget.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor.")]
Text = Annotated[Path | None, typer.Option("--text", help="Text to measure perplexity on.")]


def _version(value: bool) -> None:
    if value:
        console.out.print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def export(
    context_: typer.Context,
    model: Model = ".",
    scores: Scores = None,
    budget: Budget = None,
    budget_scope: Scope = "memory",
    format_: Format = None,
    layout: LayoutName = None,
    types: Types = "",
    context: Context = None,
    cache_type: CacheType = None,
    prompt_batch: PromptBatch = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: ./export/FORMAT.")] = None,
    text: Text = None,
    verify: Annotated[bool, typer.Option(help="Open the export in its runtime and compare.")] = True,
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

        acip-export --budget 900MB --format onnx --context 2048 --dry-run
    """
    if context_.invoked_subcommand is not None:
        return
    if budget is None and format_ is None:
        console.out.print(context_.get_help())
        raise typer.Exit
    from acip_export import pipeline

    request = _request(budget, budget_scope, format_, layout, types, context, cache_type, prompt_batch)
    target = out or Path("export") / request.target
    if not dry_run:
        refuse_existing(target, force)
    checkpoint = Checkpoint.open(model)
    opened = pipeline.open_scores(checkpoint, scores)
    plan = pipeline.plan_export(checkpoint, opened, request)
    windows = None if text is None else pipeline.text_windows(checkpoint, text, plan.runtime.context)
    if not json:
        console.show_plan(plan, verbose)
    if dry_run:
        if json:
            console.print_json(plan.to_json())
        return
    with console.stage_bars() as progress:
        report = pipeline.export_model(
            checkpoint, opened, plan, target, force, verify, windows, measure_speed=verify, progress=progress
        )
    if json:
        console.print_json({"out": str(target), "plan": plan.to_json(), "report": report and report.to_json()})
        return
    if report is not None:
        console.out.print()
        console.show_reports([report])
    console.show_export(plan, target)


@app.command()
def rank(
    model: Annotated[str, typer.Argument(help="Model directory or Hugging Face id.")] = ".",
    data: Annotated[Path | None, typer.Option(help="Calibration text: a file, or a directory of *.txt.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: MODEL/NAME.acip.")] = None,
    algorithm: Annotated[
        Literal["acip", "kfac", "energy", "magnitude"],
        typer.Option(help="acip learns the order; the others need no training."),
    ] = "acip",
    units: Annotated[Literal["singular"], typer.Option(help="What is ranked.")] = "singular",
    basis: Annotated[
        Literal["svd", "input", "kfac"] | None, typer.Option(help="Basis of the components, for acip.")
    ] = None,
    objective: Annotated[Literal["ce", "distill"] | None, typer.Option(help="Loss that acip trains on.")] = None,
    stop_ratio: Annotated[float | None, typer.Option(help="Masks stop at this share of the parameters.")] = None,
    post_tune: Annotated[int | None, typer.Option(help="Steps of the adapters alone, after the masks.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of masks and adapters.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window. Default: 512, or the model's limit.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of acip.")] = False,
    json: Json = False,
    force: Force = False,
) -> None:
    """Learn which components matter: one run, one score file, any size afterwards.

    acip-export rank . --data text.txt

    acip-export rank . --data text.txt --algorithm kfac
    """
    from acip_export import pipeline

    if data is None:
        raise UsageError("no calibration text; give a file or a directory of *.txt with  --data")
    chosen = {
        "basis": basis,
        "objective": objective,
        "stop_ratio": stop_ratio,
        "post_tune": post_tune,
        "learning_rate": learning_rate,
    }
    settings = {name: value for name, value in chosen.items() if value is not None}
    if settings and algorithm != "acip":
        flag = next(iter(settings)).replace("_", "-")
        raise UsageError(f"--{flag} is a setting of acip; --algorithm {algorithm} has none")
    checkpoint = Checkpoint.open(model)
    target = out or checkpoint.path / f"{checkpoint.name}.acip"
    try:
        with console.ranking_bars() as progress:
            scores = pipeline.rank_to_file(
                checkpoint, data, target, algorithm, settings, context, seed, device, force, resume, progress
            )
    except KeyboardInterrupt:
        from acip_export.rank.resume import run_file

        if run_file(target).exists():
            console.note(f"the run is kept in {run_file(target)}; go on with the same command and  --resume")
        raise
    if json:
        console.print_json({"out": str(target), **pipeline.ranking_summary(scores)})
    else:
        console.show_ranking(scores, target)


@app.command()
def plan(
    model: Model = ".",
    scores: Scores = None,
    budget: Budget = None,
    budget_scope: Scope = "memory",
    format_: Format = None,
    layout: LayoutName = None,
    types: Types = "",
    context: Context = None,
    cache_type: CacheType = None,
    prompt_batch: PromptBatch = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the plan to this file.")] = None,
    json: Json = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Show where every byte of a budget would go.

    acip-export plan --budget 900MB --format gguf -o plan.json
    """
    from acip_export import pipeline

    request = _request(budget, budget_scope, format_, layout, types, context, cache_type, prompt_batch)
    if out is not None:
        refuse_existing(out, force)
    checkpoint = Checkpoint.open(model)
    made = pipeline.plan_export(checkpoint, pipeline.open_scores(checkpoint, scores), request)
    if out is not None:
        save_plan(made, out, force)
    if json:
        console.print_json(made.to_json())
    else:
        console.show_plan(made, verbose)


@app.command()
def materialize(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    model: Model = ".",
    scores: Scores = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory.")] = Path("bundle"),
    json: Json = False,
    force: Force = False,
) -> None:
    """Write the bundle of a plan: the factorized model in PyTorch's numbers.

    acip-export materialize plan.json -o bundle
    """
    from acip_export import pipeline
    from acip_export.materialize import materialize_bundle

    refuse_existing(out, force)
    checkpoint = Checkpoint.open(model)
    with console.stage_bars() as progress:
        materialize_bundle(
            checkpoint,
            pipeline.open_scores(checkpoint, scores),
            load_plan(plan_file),
            out,
            force,
            lambda p: progress(pipeline.StageProgress("materialize", p.done, p.total, p.tensor)),
        )
    _done({"bundle": str(out)}, json, f"bundle written to {out}; next:  acip-export convert {out}")


@app.command()
def convert(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: ./export/FORMAT.")] = None,
    json: Json = False,
    force: Force = False,
) -> None:
    """Write a bundle in its target's format.

    acip-export convert bundle -o export/gguf
    """
    from acip_export import pipeline
    from acip_export.bundle import Bundle

    target = out or Path("export") / Bundle.open(bundle).plan.target
    with console.stage_bars() as progress:
        made = pipeline.convert_bundle(bundle, target, force, progress)
    data = {"out": str(target), "files": dict(made.files)}
    _done(data, json, f"{made.planned_bytes:,} bytes, as planned, written to {target}")


@app.command()
def verify(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export directory.")],
    model: Model = ".",
    scores: Scores = None,
    bundle: Annotated[Path | None, typer.Option(help="Its bundle. Default: materialized again from the model.")] = None,
    text: Text = None,
    json: Json = False,
) -> None:
    """Prove an export in its real runtime: bytes, logits, greedy tokens, perplexity, speed.

    acip-export verify export/gguf --text held-out.txt
    """
    from acip_export import pipeline
    from acip_export.verify.verify import require_passed

    with console.stage_bars() as progress:
        report = pipeline.verify_directory(export_dir, model, scores, bundle, text, progress)
    if json:
        console.print_json(report.to_json())
    else:
        console.show_reports([report])
    require_passed(report)


@app.command()
def formats(json: Json = False) -> None:
    """List targets, layouts and weight types."""
    if not json:
        console.show_formats()
        return
    console.print_json(
        {
            name: {
                "layouts": [layout.name for layout in target.layouts],
                "cache_types": list(target.cache_types),
                "types": [
                    {"name": f.name, "bits_per_weight": f.bits_per_weight, "block": f.block} for f in formats_of(name)
                ],
            }
            for name, target in TARGETS.items()
        }
    )


app.command()(inspect.inspect)
app.command()(check.check)


def _request(
    budget: str | None,
    scope: Literal["memory", "file"],
    format_: str | None,
    layout: str | None,
    types: str,
    context: int | None,
    cache_type: str | None,
    prompt_batch: int | None,
) -> PlanRequest:
    from acip_export.plan import PlanRequest

    if budget is None:
        raise UsageError("no budget; give one with  --budget 4GB")
    if format_ is None:
        raise UsageError(f"no target; choose one with  --format {'|'.join(TARGETS)}")
    if prompt_batch is not None and prompt_batch < 1:
        raise UsageError(f"--prompt-batch {prompt_batch} must be at least 1")
    names = tuple(name.strip().lower() for name in types.split(",") if name.strip())
    return PlanRequest(
        target=format_,
        budget_bytes=parse_bytes(budget),
        budget_scope=scope,
        layout=layout,
        types=names,
        context=context,
        cache_type=cache_type,
        prompt_batch=prompt_batch,
    )


def _done(data: dict[str, Any], json: bool, message: str) -> None:
    if json:
        console.print_json(data)
    else:
        console.out.print(message, markup=False)


class _Interruption:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, and remembers: C code between here and there may replace it."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        self.happened = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point with the one error boundary."""
    debug = "--debug" in sys.argv
    interruption = _Interruption()
    # Unwinding removes half-written output; the default action of SIGTERM would leave it.
    signal.signal(signal.SIGTERM, interruption)
    signal.signal(signal.SIGINT, interruption)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A console without UTF-8 shows question marks; it is no reason to fail.
            stream.reconfigure(errors="replace")
    try:
        app()
    except BaseException as error:
        if interruption.happened or isinstance(error, KeyboardInterrupt):
            console.note("interrupted; nothing was left half-written")
            sys.exit(EXIT_INTERRUPTED)
        if debug or not isinstance(error, Exception):
            raise
        if not isinstance(error, AcipError):
            error = AcipError(f"this is a bug: {error!r}\nRun again with --debug and report the traceback")
        console.print_error(error)
        sys.exit(error.exit_code)
