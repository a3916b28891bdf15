"""``acip-export convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import OUTPUT, Debug, Force, Json, Quiet, default_place
from acip_export.units import format_bytes


def convert(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Default: export/FORMAT-SIZE.", rich_help_panel=OUTPUT),
    ] = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a bundle in the format that its plan names.

    acip-export convert bundle -o export/gguf-4GB
    """
    from acip_export import api as pipeline
    from acip_export.artifacts.bundle import Bundle

    if out is None:
        plan = Bundle.open(bundle).plan
        out = default_place(plan.format, plan.budget_bytes)
    with console.stage_progress() as progress:
        made = pipeline.convert_bundle(bundle, out, force, progress)
    data = {"out": str(out), "files": dict(made.files)}
    size = f"{format_bytes(made.planned_bytes)} ({made.planned_bytes:,} bytes)"
    console.done(data, json, f"{size}, as planned, written to {out}")
