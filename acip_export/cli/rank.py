"""``acip-export rank``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from acip_export.cli import output as console
from acip_export.cli.options import Cache, Debug, Force, Json, Quiet
from acip_export.cli.tables.ranking import show_ranking
from acip_export.errors import UsageError
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking.algorithms import algorithms, find_algorithm, learned_algorithms
from acip_export.ranking.config import Basis, Objective, Precision
from acip_export.units import format_seconds, parse_bytes, parse_seconds

_LEARNED = learned_algorithms()
_ALGORITHM_HELP = "How to rank. " + " ".join(f"{known.name}: {known.summary}" for known in algorithms().values())
if TYPE_CHECKING:
    _AlgorithmName = str
else:
    _AlgorithmName = Literal[tuple(algorithms())]


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
    algorithm: Annotated[_AlgorithmName, typer.Option(help=_ALGORITHM_HELP)] = "acip",
    basis: Annotated[Basis | None, typer.Option(help=f"Basis of the components, for {_LEARNED}.")] = None,
    objective: Annotated[Objective | None, typer.Option(help=f"Loss that {_LEARNED} trains on.")] = None,
    stop_ratio: Annotated[float | None, typer.Option(help="Masks stop at this share of the parameters.")] = None,
    post_tune: Annotated[int | None, typer.Option(help="Steps of the adapters alone, after the masks.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of masks and adapters.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step, of all processes together.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help=f"Any other hyper-parameter of {_LEARNED}; may be repeated."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window. Default: 512, or the model's limit.")] = None,
    seed: Annotated[int, typer.Option(help="What everything random follows from.")] = 0,
    torch_device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1.")] = "auto",
    precision: Annotated[
        Precision,
        typer.Option(help="Type of frozen weights and factors; auto: as stored, float32 for small models on CPUs."),
    ] = "auto",
    recompute_activations: Annotated[
        bool | None, typer.Option(help="Recompute activations instead of keeping them. Default: from 1e9 weights.")
    ] = None,
    store_every: Annotated[int, typer.Option(help=f"Steps between the run states that are stored of {_LEARNED}.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help=f"Go on with an interrupted run of {_LEARNED}.")] = False,
    slim: Annotated[
        bool,
        typer.Option(
            "--slim",
            help="Leave out second moments: types can be planned with the small file, but no factor pairs and no error "
            "feedback.",
        ),
    ] = False,
    log_json: Annotated[Path | None, typer.Option(help="Append progress as JSON lines to this file.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Write progress for TensorBoard to this directory.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="TIME", help="Fit the ranking to so much time: 20min, 90s, 2h.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Fit the ranking to so much memory: 6GB.")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it takes: time, memory, disk. Needs no text, no weights.")
    ] = False,
    cache: Cache = None,
    measure_rounding: Annotated[
        bool, typer.Option(help="Measure what the installed quantizers cost: the first plan then takes seconds.")
    ] = True,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn which components matter: one run, one score file, any size afterwards.

    acip-export rank . --data text.txt

    acip-export rank . --data chats.jsonl --field messages --algorithm kfac

    accelerate launch --num_processes 2 -m acip_export rank . --data text.txt
    """
    from acip_export import api as pipeline
    from acip_export.api import verbs
    from acip_export.io.outputs import claim_output
    from acip_export.ranking import parse_settings
    from acip_export.ranking.logs import LOG_KIND, json_log, tensorboard_log, to_all
    from acip_export.ranking.processes import launched_index

    if data is None and not estimate:
        raise UsageError("no calibration text; give a file, a directory, a data set or  self  with  --data")
    chosen = {
        "basis": basis,
        "objective": objective,
        "stop_ratio": stop_ratio,
        "post_tune": post_tune,
        "learning_rate": learning_rate,
        "batch": batch,
    }
    settings = {name: value for name, value in chosen.items() if value is not None} | parse_settings(set_ or [])
    if settings and not find_algorithm(algorithm).learns:
        name = next(iter(settings))
        flag = name.replace("_", "-") if name in chosen else f"set {name}"
        raise UsageError(f"--{flag} is a setting of {_LEARNED}; --algorithm {algorithm} has none")
    seconds = None if time is None else parse_seconds(time)
    bytes_ = None if memory is None else parse_bytes(memory, "memory")
    if estimate:
        _estimate(model, algorithm, settings, context, out, seconds, bytes_, json)
        return
    assert data is not None
    checkpoint = Checkpoint.open(model)
    place = out or checkpoint.path / f"{checkpoint.name}.acip"
    if log_json is not None:
        log_json = claim_output(log_json, LOG_KIND, True, (data, place, cache), checkpoint.path).place
    # Of several processes one draws and logs, as one writes.
    is_main = launched_index() == 0
    try:
        with ExitStack() as stack:
            callbacks = []
            if is_main:
                callbacks.append(stack.enter_context(console.stage_progress()))
                if log_json is not None:
                    callbacks.append(stack.enter_context(json_log(log_json)))
                if tensorboard is not None:
                    callbacks.append(stack.enter_context(tensorboard_log(tensorboard)))
            scores = verbs.rank(
                checkpoint,
                data,
                out=place,
                algorithm=algorithm,
                field=field,
                context=context,
                seed=seed,
                settings=settings,
                device=torch_device,
                precision=precision,
                recompute_activations=recompute_activations,
                store_every=store_every,
                cache=cache,
                slim=slim,
                force=force,
                resume=resume,
                progress=to_all(callbacks),
                seconds=seconds,
                memory=bytes_,
                announce=console.note if is_main else _silently,
            )
    except KeyboardInterrupt:
        from acip_export.ranking.run_state import run_file

        if is_main and run_file(place).exists():
            console.note(f"the run is kept in {run_file(place)}; go on with the same command and  --resume")
        raise
    if not is_main:
        return
    if measure_rounding:
        with console.stage_progress() as progress:
            pipeline.measure_rounding_errors(checkpoint, place, progress)
    if json:
        console.print_json({"out": str(place), **pipeline.ranking_summary(scores)})
    else:
        show_ranking(scores, place)


def _silently(_line: str) -> None:
    """Say nothing."""


def _estimate(
    model: str,
    algorithm: str,
    settings: Mapping[str, Any],
    context: int | None,
    out: Path | None,
    seconds: float | None,
    memory: int | None,
    json: bool,
) -> None:
    from acip_export.ranking import DataConfig, automatic_config
    from acip_export.ranking.estimate import open_sizes
    from acip_export.ranking.fitting import Limits, fit_ranking

    checkpoint, chosen = open_sizes(model), find_algorithm(algorithm)
    acip = replace(automatic_config(checkpoint), **settings) if chosen.learns else None
    limits = Limits(seconds, memory, asked=seconds is not None or memory is not None)
    fitted = fit_ranking(checkpoint, chosen, acip, DataConfig(context=context), limits)
    taken, calibration = fitted.estimate, fitted.calibration
    if json:
        console.print_json(
            {
                "algorithm": fitted.algorithm.name,
                "seconds": {"total": taken.total_seconds, **taken.seconds},
                "memory": taken.memory,
                "disk": taken.disk,
                "statistics_tokens": calibration.statistics_tokens,
                "gradient_tokens": calibration.gradient_tokens,
                "curve_tokens": calibration.curve_tokens,
                "batch": calibration.batch,
                "changes": list(fitted.changes),
            }
        )
        return
    console.out.print(fitted.summary(), markup=False)
    for stage, part in taken.seconds.items():
        console.out.print(f"  {stage:<12} {format_seconds(part)}", markup=False)
    for line in fitted.changes:
        console.out.print(line, markup=False)
