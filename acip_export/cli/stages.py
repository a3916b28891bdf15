"""One stage alone: ``materialize``, ``convert``, ``verify``; ``imatrix``; and the list of ``formats``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from acip_export.artifacts.names import PLAN_FILE
from acip_export.artifacts.plan import load_plan
from acip_export.cli import output as console
from acip_export.cli.options import Cache, Force, Json, Model, Scores, Tasks, Text, Timeout, names
from acip_export.formats.targets import TARGETS
from acip_export.io.atomic import refuse_existing
from acip_export.model.checkpoint import Checkpoint
from acip_export.verification.process import DEFAULT_TIMEOUT_SECONDS
from acip_export.weight_types import types_of


def materialize(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    model: Model = ".",
    scores: Scores = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory.")] = Path("bundle"),
    cache: Cache = None,
    json: Json = False,
    force: Force = False,
) -> None:
    """Write the bundle of a plan: the factorized model in PyTorch's numbers.

    acip-export materialize plan.json -o bundle
    """
    from acip_export import api as pipeline

    refuse_existing(out, force)
    checkpoint = Checkpoint.open(model)
    with console.stage_bars() as progress:
        pipeline.materialize_bundle(
            checkpoint, pipeline.open_scores(checkpoint, scores), load_plan(plan_file), out, force, progress, cache
        )
    _done({"bundle": str(out)}, json, f"bundle written to {out}; next:  acip-export convert {out}")


def convert(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: ./export/FORMAT.")] = None,
    json: Json = False,
    force: Force = False,
) -> None:
    """Write a bundle in its target's format.

    acip-export convert bundle -o export/gguf
    """
    from acip_export import api as pipeline
    from acip_export.artifacts.bundle import Bundle

    target = out or Path("export") / Bundle.open(bundle).plan.format
    with console.stage_bars() as progress:
        made = pipeline.convert_bundle(bundle, target, force, progress)
    data = {"out": str(target), "files": dict(made.files)}
    _done(data, json, f"{made.planned_bytes:,} bytes, as planned, written to {target}")


def verify(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export directory.")],
    model: Model = ".",
    scores: Scores = None,
    bundle: Annotated[Path | None, typer.Option(help="Its bundle. Default: materialized again from the model.")] = None,
    text: Text = None,
    tasks: Tasks = "",
    timeout: Timeout = DEFAULT_TIMEOUT_SECONDS,
    json: Json = False,
) -> None:
    """Prove an export in its real runtime, and write report.json: files, logits, quality, memory, time, speed.

    acip-export verify export/gguf --text held-out.txt
    """
    from acip_export import api as pipeline
    from acip_export.verification.export import require_passed

    with console.stage_bars() as progress:
        report = pipeline.verify_directory(export_dir, model, scores, bundle, text, names(tasks), timeout, progress)
    plan = load_plan(export_dir / PLAN_FILE)
    checkpoint, opened = pipeline.ranked_model_of(plan, model, scores)
    pipeline.write_report(export_dir, checkpoint, opened)
    if json:
        console.print_json(report.to_json())
    else:
        console.show_reports([report])
    require_passed(report)


def imatrix(
    scores: Annotated[
        Path | None, typer.Argument(metavar="[SCORES]", help="Score file. Default: the *.acip beside the model.")
    ] = None,
    model: Model = ".",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file.")] = Path("imatrix.gguf"),
    json: Json = False,
    force: Force = False,
) -> None:
    """Write what a ranking measured as llama.cpp's importance matrix, for llama-quantize --imatrix.

    acip-export imatrix model.acip -o imatrix.gguf

    The other way, to round with a matrix that llama-imatrix made: acip-export --format gguf --imatrix FILE.
    """
    from acip_export import api as pipeline

    refuse_existing(out, force)
    checkpoint = Checkpoint.open(model)
    count = pipeline.write_imatrix(checkpoint, pipeline.open_scores(checkpoint, scores), out, force)
    _done({"out": str(out), "matrices": count}, json, f"importance of {count} matrices written to {out}")


def formats(json: Json = False) -> None:
    """List targets, layouts and weight types."""
    if not json:
        console.show_formats()
        return
    console.print_json(
        {
            name: {
                "layouts": [layout.name for layout in target.layouts],
                "runtimes": {runtime: list(layouts) for runtime, layouts in target.runtimes.items()},
                "cache_types": list(target.cache_types),
                "types": [
                    {"name": f.name, "bits_per_weight": f.bits_per_weight, "block": f.block} for f in types_of(name)
                ],
            }
            for name, target in TARGETS.items()
        }
    )


def _done(data: dict[str, Any], json: bool, message: str) -> None:
    if json:
        console.print_json(data)
    else:
        console.out.print(message, markup=False)
