"""Fit a ranking to the time, memory and disk that there are, before any weight is read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from acip_export.errors import InfeasibleBudgetError, OutputError
from acip_export.io.kept_work import kept_bytes
from acip_export.machine import Machine
from acip_export.model.checkpoint import Checkpoint
from acip_export.ranking.acip_defaults import mask_steps_of
from acip_export.ranking.algorithm import Algorithm
from acip_export.ranking.algorithms import find_algorithm
from acip_export.ranking.config import AcipConfig, DataConfig, Precision
from acip_export.ranking.estimate import RankEstimate, RankModel
from acip_export.units import format_bytes, format_seconds

# What is ranked without training where there is no time for it.
_TRAINING_FREE = "fisher"
# Fewer steps than these learn nothing that is worth their time (docs/LOG.md: 100 and 150 do). Before there are fewer
# than enough, they read fewer windows.
_LEAST_STEPS, _ENOUGH_STEPS = 100, 300
# Share of the masks where there are fewer steps than wanted: adapters gain more by step.
_MASKS_OF_FEW = 0.25
_SHARES = (1.0, 0.75, 0.5, 0.25)
_LEAST_TOKENS = 1024

# Tells the seconds of what follows a ranking, by stage.
Beside = Callable[[Machine], Mapping[str, float]]


def nothing_beside(_machine: Machine) -> Mapping[str, float]:
    """Nothing follows."""
    return {}


@dataclass(frozen=True)
class Limits:
    """Hold what a ranking may take.

    Attributes:
        seconds, memory, disk: at most; ``None``: whatever it takes. asked: whether anybody wants it to fit itself to
            them; otherwise only what cannot be done at all is refused.
    """

    seconds: float | None = None
    memory: int | None = None
    disk: int | None = None
    asked: bool = True

    @classmethod
    def of(cls, seconds: float | None, memory: int | None, out: Path | None) -> Limits:
        """Add what this machine has to what the user said, for the score file ``out``."""
        directory = Path(tempfile.gettempdir()) if out is None else out.absolute().parent
        while not directory.exists():
            directory = directory.parent
        free = shutil.disk_usage(directory).free + (0 if out is None else kept_bytes(out.absolute()))
        return cls(seconds, memory or _available_memory(), free, seconds is not None or memory is not None)


@dataclass(frozen=True)
class Fitted:
    """Hold the settings of a ranking that fits, what it takes, and what had to be changed for that, in words."""

    algorithm: Algorithm
    acip: AcipConfig | None
    calibration: DataConfig
    estimate: RankEstimate
    changes: tuple[str, ...]

    def summary(self) -> str:
        """Say what it takes."""
        taken = self.estimate
        return (
            f"ranking with {self.algorithm.name} takes about {format_seconds(taken.total_seconds)}, "
            f"{format_bytes(taken.memory)} of memory and {format_bytes(taken.disk)} of disk"
        )


def fit_ranking(
    checkpoint: Checkpoint,
    algorithm: Algorithm,
    acip: AcipConfig | None,
    calibration: DataConfig,
    limits: Limits,
    machine: Machine | None = None,
    beside: Beside = nothing_beside,
    precision: Precision = "auto",
) -> Fitted:
    """Choose tokens, windows at a time, and steps so that a ranking stays within ``limits``.

    As little is changed as will do: steps of an algorithm that learns first. A time that is too short for the smallest
    ranking is exceeded by as little as possible; a memory or a disk never.

    Args:
        beside: what follows the ranking, whose time counts.
        precision: see :func:`acip_export.ranking.load.load_model`.

    Raises:
        InfeasibleBudgetError: too little memory for the smallest ranking. OutputError: too little disk for it.
    """
    machine = machine or Machine.measured(checkpoint.shape.hidden)
    model = RankModel(checkpoint, beside(machine), precision)
    calibration = calibration.for_weights(model.weights)
    changes: list[str] = []
    if acip is not None and limits.seconds is not None:
        learned = _learned_within(model, acip, calibration, algorithm, limits.seconds, machine)
        if learned is None:
            changes.append(
                f"{format_seconds(limits.seconds)} are too short for {algorithm.name} to learn anything; ranking with "
                f"{_TRAINING_FREE} instead, which trains nothing"
            )
            algorithm, acip = find_algorithm(_TRAINING_FREE), None
        elif learned != acip:
            changes.append(
                f"{_steps_of(learned):,} steps of {learned.batch} windows instead of {_steps_of(acip):,} of "
                f"{acip.batch}, to stay within {format_seconds(limits.seconds)}"
            )
            acip = learned
    ways = [(way, chosen, model.estimate(way, algorithm, chosen, machine)) for way, chosen in _ways(calibration, acip)]
    _refuse_if_too_large(checkpoint, algorithm, ways[-1][2], limits)
    if not limits.asked:
        way, chosen, taken = ways[0]
        if not _fits(taken, limits):
            there = f"{format_bytes(limits.memory or 0)} of memory and {format_bytes(limits.disk or 0)} of disk"
            fits = f"--memory {(limits.memory or 0) // 10**6}MB"
            changes.append(f"that is more than there is, {there}; with  {fits}  it fits itself to that")
        return Fitted(algorithm, chosen, way, taken, tuple(changes))
    fitting = [entry for entry in ways if _fits(entry[2], limits)]
    if not fitting:
        changes.append(
            f"the smallest ranking takes longer than {format_seconds(limits.seconds or 0)}; it is what follows"
        )
    way, chosen, taken = (fitting or ways[-1:])[0]
    return Fitted(algorithm, chosen, way, taken, (*changes, *_said(calibration, way, acip, chosen)))


def _refuse_if_too_large(checkpoint: Checkpoint, algorithm: Algorithm, smallest: RankEstimate, limits: Limits) -> None:
    if limits.memory is not None and smallest.memory > limits.memory:
        advice = f"{_TRAINING_FREE}  holds one block of the model at a time" if algorithm.learns else ""
        raise InfeasibleBudgetError(
            f"ranking {checkpoint.name} with {algorithm.name} takes at least {format_bytes(smallest.memory)} of "
            f"memory, expected at most {format_bytes(limits.memory)}.\n"
            f"--memory {-(-smallest.memory // 10**6)}MB  would fit" + (f"; --algorithm {advice}" if advice else ""),
            smallest.memory,
        )
    if limits.disk is not None and smallest.disk > limits.disk:
        raise OutputError(
            f"ranking {checkpoint.name} takes at least {format_bytes(smallest.disk)} of disk, and "
            f"{format_bytes(limits.disk)} are free.\nMake room, or choose another place for the score file with  --out"
        )


def _fits(taken: RankEstimate, limits: Limits) -> bool:
    return (
        (limits.seconds is None or taken.total_seconds <= limits.seconds)
        and (limits.memory is None or taken.memory <= limits.memory)
        and (limits.disk is None or taken.disk <= limits.disk)
    )


def _ways(calibration: DataConfig, acip: AcipConfig | None) -> Iterator[tuple[DataConfig, AcipConfig | None]]:
    """Yield settings from the best to the smallest."""
    assert calibration.statistics_tokens is not None and calibration.gradient_tokens is not None
    for share in _SHARES:
        inputs, gradients, held_out = (
            max(min(_LEAST_TOKENS, tokens), int(tokens * share))
            for tokens in (calibration.statistics_tokens, calibration.gradient_tokens, calibration.curve_tokens)
        )
        fewer = replace(calibration, statistics_tokens=inputs, gradient_tokens=gradients, curve_tokens=held_out)
        for part in (1, 2, 4):
            learned = None if acip is None else replace(acip, batch=max(1, acip.batch // part))
            yield replace(fewer, batch=max(1, calibration.batch // part)), learned


def _said(before: DataConfig, after: DataConfig, acip: AcipConfig | None, chosen: AcipConfig | None) -> Iterator[str]:
    if after.statistics_tokens != before.statistics_tokens:
        yield (
            f"statistics of {after.statistics_tokens:,} tokens instead of {before.statistics_tokens:,}, gradients of "
            f"{after.gradient_tokens:,}, to stay within what there is"
        )
    if after.batch != before.batch:
        yield f"{after.batch} windows at a time instead of {before.batch}, to stay within what there is"
    elif acip is not None and chosen is not None and chosen.batch != acip.batch:
        yield f"{chosen.batch} windows a step instead of {acip.batch}, to stay within what there is"


def _learned_within(
    model: RankModel,
    acip: AcipConfig,
    calibration: DataConfig,
    algorithm: Algorithm,
    seconds: float,
    machine: Machine,
) -> AcipConfig | None:
    """Return settings whose ranking takes ``seconds``: of fewer steps, or of fewer windows where steps are too few.

    Returns:
        ``None``: there is no time for steps that learn anything.
    """
    wanted = _steps_of(acip)
    batch, steps = acip.batch, 0
    while True:
        smaller = replace(acip, batch=batch)
        whole = model.estimate(calibration, algorithm, smaller, machine)
        learning = whole.seconds["learning"]
        steps = int((seconds - whole.total_seconds + learning) / (learning / wanted))
        if steps >= wanted:
            return smaller
        if steps >= min(_ENOUGH_STEPS, wanted) or batch == 1:
            break
        batch //= 2
    return _with_steps(smaller, steps) if steps >= min(_LEAST_STEPS, wanted) else None


def _steps_of(acip: AcipConfig) -> int:
    return mask_steps_of(acip) + acip.post_tune


def _with_steps(acip: AcipConfig, steps: int) -> AcipConfig:
    """Share ``steps`` between masks and adapters; the learning rate carries masks as far in fewer steps."""
    masks = mask_steps_of(acip)
    fewer = max(1, min(steps * masks // (masks + acip.post_tune), int(steps * _MASKS_OF_FEW)))
    return replace(acip, post_tune=steps - fewer, learning_rate=acip.learning_rate * masks / fewer)


def _available_memory() -> int | None:
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
