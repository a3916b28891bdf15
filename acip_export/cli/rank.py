"""``acip-export rank``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from acip_export.cli import output as console
from acip_export.cli.options import MACHINE, METHOD, OUTPUT, TEXT, Cache, Debug, Force, Json, Quiet
from acip_export.cli.tables.ranking import show_ranking
from acip_export.errors import UsageError
from acip_export.formats.registry import format_names
from acip_export.io.stamps import stamp_of
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Course, ProgressCallback, types_stage
from acip_export.ranking.algorithms import algorithms, find_algorithm, learned_algorithms
from acip_export.ranking.config import Basis, Objective, Precision, parse_settings
from acip_export.text.documents import check_documents
from acip_export.units import format_seconds, parse_bytes, parse_seconds

_LEARNED = learned_algorithms()
_UNTRAINED = ", ".join(name for name, known in algorithms().items() if not known.learns)
_ALGORITHM_HELP = (
    f"{_LEARNED}: learned; without training: {_UNTRAINED}. Default: {_LEARNED}; fisher where that takes hours.\n\n"
    + " ".join(f"{known.name}: {known.summary}" for known in algorithms().values())
)
if TYPE_CHECKING:
    from acip_export.ranking.fitting import Fitted

    _AlgorithmName = str
else:
    _AlgorithmName = Literal[tuple(algorithms())]


def rank(
    model: Annotated[str, typer.Argument(help="Model directory or Hugging Face id.")] = ".",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|ID|self",
            help="Calibration text: what the ranking reads.\n\nPlain, .jsonl, .json, .csv, .parquet, a directory of "
            "them, a Hugging Face data set (owner/name[/config][:split]), or self: sampled from the model.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Field of records that holds the text, or a chat.", rich_help_panel=TEXT)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Default: MODEL/NAME.acip.", rich_help_panel=OUTPUT),
    ] = None,
    algorithm: Annotated[
        _AlgorithmName | None, typer.Option(metavar="NAME", help=_ALGORITHM_HELP, rich_help_panel=METHOD)
    ] = None,
    basis: Annotated[
        Basis | None, typer.Option(help=f"Basis of the components, for {_LEARNED}.", rich_help_panel=METHOD)
    ] = None,
    objective: Annotated[
        Objective | None, typer.Option(help=f"Loss that {_LEARNED} trains on.", rich_help_panel=METHOD)
    ] = None,
    stop_ratio: Annotated[
        float | None, typer.Option(help="Masks stop at this share of the parameters.", rich_help_panel=METHOD)
    ] = None,
    post_tune: Annotated[
        int | None, typer.Option(help="Steps of the adapters alone, after the masks.", rich_help_panel=METHOD)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of masks and adapters.", rich_help_panel=METHOD)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows per step, of all processes together.", rich_help_panel=METHOD)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help=f"Another setting of {_LEARNED}; repeatable.", rich_help_panel=METHOD
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Tokens per window. Default: 512, or the model's limit.", rich_help_panel=TEXT
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.", rich_help_panel=METHOD),
    ] = 0,
    torch_device: Annotated[
        str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1.", rich_help_panel=MACHINE)
    ] = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            metavar="NAME",
            help="Dtype of frozen weights: auto, float32, model.\n\nauto: as stored, float32 for small models on CPUs.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    recompute_activations: Annotated[
        bool | None, typer.Option(help="Recompute them. Default: from 1e9 weights.", rich_help_panel=MACHINE)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help=f"Go on with an interrupted run of {_LEARNED}.", rich_help_panel=OUTPUT)
    ] = False,
    log_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append progress as JSON lines.", rich_help_panel=OUTPUT)
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write progress for TensorBoard.", rich_help_panel=OUTPUT)
    ] = None,
    slim: Annotated[
        bool,
        typer.Option(
            "--slim",
            help="A file of at most 1 % of a large model.\n\nWithout second moments: types can be planned with it, but "
            "no factor pairs and no error feedback.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    time: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Fit the ranking to it: 20min, 90s, 2h.", rich_help_panel=MACHINE),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fit the ranking to it: 6GB.", rich_help_panel=MACHINE)
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Only say what it takes: time, memory, disk.\n\nNeeds no text and no weights.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    cache: Cache = None,
    measure_rounding: Annotated[
        bool,
        typer.Option(
            help="Measure the quantizers, too (default).\n\nThe first plan then takes seconds.", rich_help_panel=OUTPUT
        ),
    ] = True,
    json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Learn which components matter: one run, one score file, any size afterwards.

    acip-export rank . --data text.txt

    acip-export rank . --data chats.jsonl --field messages --algorithm kfac

    torchrun --nproc-per-node 2 -m acip_export rank . --data text.txt
    """
    if data is None and not estimate:
        raise UsageError(
            "no calibration text; name a file, a directory, a data set or  self:\n"
            f"  {shlex.join(['acip-export', 'rank', model])} --data text.txt"
        )
    chosen = {
        "basis": basis,
        "objective": objective,
        "stop_ratio": stop_ratio,
        "post_tune": post_tune,
        "learning_rate": learning_rate,
        "batch": batch,
    }
    settings = {name: value for name, value in chosen.items() if value is not None} | parse_settings(set_ or [])
    if algorithm is not None and settings and not find_algorithm(algorithm).learns:
        name = next(iter(settings))
        flag = name.replace("_", "-") if name in chosen else f"set {name}"
        raise UsageError(f"--{flag} is a setting of {_LEARNED}; --algorithm {algorithm} has none")
    seconds = None if time is None else parse_seconds(time)
    bytes_ = None if memory is None else parse_bytes(memory, "memory")
    if estimate:
        known = model, algorithm, torch_device, precision
        _estimate(*known, settings, context, resume, seconds, bytes_, json, measure_rounding)
        return
    assert data is not None
    if data != "self":
        check_documents(data)
    # What is wrong so far is said without torch, which takes seconds to import.
    from acip_export import api as pipeline
    from acip_export.api import verbs
    from acip_export.artifacts.scores import SCORES_KIND
    from acip_export.io.outputs import claim_output
    from acip_export.ranking import default_algorithm
    from acip_export.ranking.fitting import nothing_beside
    from acip_export.ranking.logs import LOG_KIND, json_log, tensorboard_log, to_all
    from acip_export.ranking.processes import launched_index

    checkpoint = Checkpoint.open(model)
    place = out or checkpoint.path / f"{checkpoint.name}.acip"
    if log_json is not None:
        log_json = claim_output(log_json, LOG_KIND, True, (data, place, cache), checkpoint.path).place
    # Of several processes one draws and logs, as one writes.
    is_main = launched_index() == 0
    named = find_algorithm(algorithm or default_algorithm(checkpoint, torch_device, settings, resume, seconds))
    expect: Callable[[Fitted], None] = _silently
    before = stamp_of(place)
    try:
        with ExitStack() as stack:
            callbacks: list[ProgressCallback] = []
            if is_main:
                stack.enter_context(claim_output(place, SCORES_KIND, force, (data,), checkpoint.path).held())
                course = _course(named.learns, data == "self", measure_rounding)
                journey = stack.enter_context(console.stage_progress(course))
                callbacks.append(journey)

                def expect(fitted: Fitted) -> None:
                    journey.expect(expected_course(fitted, data == "self"))

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
                cache=cache,
                slim=slim,
                force=force,
                resume=resume,
                progress=to_all(callbacks),
                seconds=seconds,
                memory=bytes_,
                beside=partial(pipeline.rounding_estimate, checkpoint) if measure_rounding else nothing_beside,
                announce=console.note if is_main else _silently,
                estimated=expect,
            )
            if is_main and measure_rounding:
                pipeline.measure_rounding_errors(checkpoint, place, to_all(callbacks))
    except KeyboardInterrupt:
        from acip_export.ranking.run_state import run_file

        if is_main and stamp_of(place) != before:  # it appears whole
            console.note(
                f"{place} is complete: the ranking is done. What was interrupted is measuring the quantizers, which "
                "only saves the first plan minutes; it measures the rest, and  --no-measure-rounding  leaves it to that"
            )
        elif is_main and run_file(place).exists():
            console.note(f"the run is kept in {run_file(place)}; go on with the same command and  --resume")
        raise
    if not is_main:
        return
    if json:
        console.print_json({"out": str(place), **pipeline.ranking_summary(scores)})
    else:
        show_ranking(scores, place)


def _course(learns: bool, sampled: bool, measured: bool) -> Course:
    """The stages of a ranking, and roughly what each takes where no estimate says it."""
    return Course(
        {
            **({"self": 4.0} if sampled else {}),
            "statistics": 4.0,
            **({"components": 1.0, "masks": 20.0, "post-tune": 8.0} if learns else {}),
            "curve": 3.0,
            **(dict.fromkeys(map(types_stage, format_names()), 1.0) if measured else {}),
        }
    )


def expected_course(fitted: Fitted, sampled: bool) -> Course:
    """The stages of a ranking with the seconds of its estimate, by the names that its progress reports have."""
    from acip_export.ranking.acip_defaults import mask_steps_of

    seconds, acip = fitted.estimate.seconds, fitted.acip
    # Nothing is estimated of text that the model samples; it takes about as long as the statistics.
    shares = {"self": seconds["statistics"]} if sampled else {}
    shares |= {"statistics": seconds["start"] + seconds["statistics"], "components": seconds["components"]}
    if "fisher" in seconds:
        shares["fisher"] = seconds["fisher"]
    if acip is not None:
        by_step = seconds["learning"] / (mask_steps_of(acip) + acip.post_tune)
        shares |= {"masks": by_step * mask_steps_of(acip), "post-tune": by_step * acip.post_tune}
    shares["curve"] = seconds["curve"]
    shares |= {stage: seconds[stage] for stage in map(types_stage, format_names()) if stage in seconds}
    return Course(shares, sum(shares.values()))


def _silently(_line: object) -> None:
    """Say nothing."""


def _estimate(
    model: str,
    algorithm: str | None,
    device: str,
    precision: Precision,
    settings: Mapping[str, Any],
    context: int | None,
    resume: bool,
    seconds: float | None,
    memory: int | None,
    json: bool,
    measured: bool,
) -> None:
    from acip_export import api as pipeline
    from acip_export.ranking import DataConfig, automatic_config, default_algorithm
    from acip_export.ranking.estimate import open_sizes
    from acip_export.ranking.fitting import Limits, fit_ranking, nothing_beside

    checkpoint = open_sizes(model)
    chosen = find_algorithm(algorithm or default_algorithm(checkpoint, device, settings, resume, seconds))
    acip = replace(automatic_config(checkpoint), **settings) if chosen.learns else None
    limits = Limits(seconds, memory, asked=seconds is not None or memory is not None)
    beside = partial(pipeline.rounding_estimate, checkpoint) if measured else nothing_beside
    data = DataConfig(context=context)
    fitted = fit_ranking(checkpoint, chosen, acip, data, limits, beside=beside, precision=precision)
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
    width = max(map(len, taken.seconds))
    for stage, part in taken.seconds.items():
        console.out.print(f"  {stage:<{width}} {format_seconds(part)}", markup=False)
    for line in fitted.changes:
        console.out.print(line, markup=False)
