"""``acip-export rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from acip_export import console
from acip_export.checkpoint import Checkpoint
from acip_export.commands.options import Force, Json
from acip_export.errors import UsageError


def rank(
    model: Annotated[str, typer.Argument(help="Model directory or Hugging Face id.")] = ".",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|ID|self",
            help="Calibration text: plain, .jsonl or .parquet, a directory of them, a Hugging Face data set "
            "(owner/name[/config][:split]), or self: sampled from the model.",
        ),
    ] = None,
    field: Annotated[str | None, typer.Option(help="Field of JSONL, Parquet and data sets: text, or a chat.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: MODEL/NAME.acip.")] = None,
    algorithm: Annotated[
        Literal["acip", "fisher", "kfac", "first-order", "energy", "magnitude"],
        typer.Option(help="acip learns the order; the others need no training."),
    ] = "acip",
    units: Annotated[Literal["singular", "channel", "kv_group"], typer.Option(help="What is ranked.")] = "singular",
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
    from acip_export.rank import DataConfig

    if data is None:
        raise UsageError("no calibration text; give a file, a directory, a data set or  self  with  --data")
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
    calibration = DataConfig(context=context, seed=seed, field=field)
    checkpoint = Checkpoint.open(model)
    target = out or checkpoint.path / f"{checkpoint.name}.acip"
    try:
        with console.ranking_bars() as progress:
            scores = pipeline.rank_to_file(
                checkpoint,
                data,
                target,
                algorithm,
                settings,
                units=units,
                calibration=calibration,
                device=device,
                force=force,
                resume=resume,
                progress=progress,
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
