"""``acip-export imatrix``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Debug, Force, Json, Model, Quiet
from acip_export.io.outputs import claim_output
from acip_export.model.checkpoint import Checkpoint


def imatrix(
    scores: Annotated[
        Path | None, typer.Argument(metavar="[SCORES]", help="Score file. Default: the *.acip beside the model.")
    ] = None,
    model: Model = ".",
    out: Annotated[Path, typer.Option("--out", "-o", help="The file.")] = Path("imatrix.gguf"),
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what a ranking measured as llama.cpp's importance matrix, for llama-quantize --imatrix.

    acip-export imatrix model.acip -o imatrix.gguf

    The other way, to round with a matrix that llama-imatrix made: acip-export --format gguf --imatrix FILE.
    """
    from acip_export import api as pipeline
    from converters.gguf.imatrix import IMATRIX_KIND

    claim_output(out, IMATRIX_KIND, force, (scores,), model)
    checkpoint = Checkpoint.open(model)
    count = pipeline.write_imatrix(checkpoint, pipeline.open_scores(checkpoint, scores), out, force)
    console.done({"out": str(out), "matrices": count}, json, f"importance of {count} matrices written to {out}")
