"""``acip-export convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Debug, Force, Json, Quiet


def convert(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: ./export/FORMAT.")] = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a bundle in the format that its plan names.

    acip-export convert bundle -o export/gguf
    """
    from acip_export import api as pipeline
    from acip_export.artifacts.bundle import Bundle

    place = out or Path("export") / Bundle.open(bundle).plan.format
    with console.stage_progress() as progress:
        made = pipeline.convert_bundle(bundle, place, force, progress)
    data = {"out": str(place), "files": dict(made.files)}
    console.done(data, json, f"{made.planned_bytes:,} bytes, as planned, written to {place}")
