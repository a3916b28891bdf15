"""``acip-export materialize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.artifacts.plan import load_plan
from acip_export.cli import output as console
from acip_export.cli.options import Cache, Debug, Force, Json, Model, Quiet, Scores
from acip_export.io.outputs import claim_output
from acip_export.model.checkpoint import Checkpoint


def materialize(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    model: Model = ".",
    scores: Scores = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory.")] = Path("bundle"),
    cache: Cache = None,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the bundle of a plan: the factorized model in PyTorch's numbers.

    acip-export materialize plan.json -o bundle
    """
    from acip_export import api as pipeline
    from acip_export.artifacts.bundle import BUNDLE_KIND

    claim_output(out, BUNDLE_KIND, force, (plan_file, scores, cache), model)
    checkpoint = Checkpoint.open(model)
    with console.stage_progress() as progress:
        pipeline.materialize_bundle(
            checkpoint, pipeline.open_scores(checkpoint, scores), load_plan(plan_file), out, force, progress, cache
        )
    console.done({"bundle": str(out)}, json, f"bundle written to {out}; next:  acip-export convert {out}")
