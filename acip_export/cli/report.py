"""``acip-export report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Debug, Json, Model, Quiet, Scores, type_names


def report(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT", help="Its directory, or the report.json in it.")],
    others: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[EXPORT]...", help="Exports of the same model and layout: their measured figures too."),
    ] = None,
    model: Model = ".",
    scores: Scores = None,
    sizes: Annotated[int, typer.Option(help="Sizes to plan for the slider, from the score file.", min=2)] = 16,
    types: Annotated[
        str, typer.Option("--types", help="Types that these sizes may take, by comma. Default: the plan's.")
    ] = "",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write report.html and the model card README.md of an export again.

    acip-export report export/gguf-4GB --model . --scores model.acip

    acip-export report export/gguf-2GB export/gguf-4GB
    """
    from acip_export import api as pipeline
    from acip_export.artifacts.export_directory import claim_papers, export_of
    from acip_export.report.page import read_export

    claim_papers(export_of(export_dir), (scores,))
    plan = read_export(export_dir).plan
    checkpoint, opened = pipeline.ranked_model_of(plan, model, scores)
    planned = (
        ()
        if checkpoint is None or opened is None
        else pipeline.planned_sizes(checkpoint, opened, plan, type_names(types), sizes)
    )
    if not planned:
        console.note("no model with a score file here: other sizes are those of the report that was there, if any")
    written = pipeline.write_report(export_dir, checkpoint, opened, others or (), planned)
    if json:
        console.print_json({"written": [str(file) for file in written], "planned_sizes": len(planned)})
    else:
        console.say(f"written: {', '.join(map(str, written))}")
