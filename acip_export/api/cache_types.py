"""What each type of KV cache costs: measured once in the runtime itself, on text that the ranking held out.

And whether the types are to be chosen by it where nothing was asked of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from acip_export.api.calibration import held_out_windows, takes_long
from acip_export.api.rank import rounding_scores
from acip_export.artifacts.cache_losses import CacheLosses, cache_file, load_cache_losses, save_cache_losses
from acip_export.artifacts.plan import Plan, Serving, cache_types
from acip_export.artifacts.scores import ScoreFile
from acip_export.errors import MissingExtraError, UnsupportedError
from acip_export.formats.protocol import AUTO
from acip_export.io.kept_states import KeptStates, states_beside
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning import Budget, PlanRequest, Problem, Question, SearchSpace, resolve
from acip_export.progress import Clock, ProgressCallback, silent
from acip_export.units import format_bytes
from acip_export.verification.metrics import compare_logits
from acip_export.version import made_by

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_PROMPT_BATCH = 128
# Long windows: what a cache loses is lost over a context.
_CONTEXT = 512
_MOST_BITS = 16
# Of a budget: from here on a cache of the default type is worth another choice where nobody made one. 8 bits give back
# half of it or more; below, weights gain from that about what such a cache costs, and measuring takes a minute.
_MUCH = 0.1


def with_cache_to_choose(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    request: PlanRequest,
    question: Question,
    unmeasured: Callable[[SearchSpace], Problem],
    progress: ProgressCallback = silent,
) -> Question:
    """Have the cache's types chosen with the weights, as ``auto`` has, where nothing was asked of them and the default
    ones take much of the budget; without a budget, of the smallest.

    The question stays as it is where they could not be chosen: what each costs is not known, and cannot be measured
    (no text, no runtime) or is not to be (:attr:`PlanRequest.calibrate`); where there is one type to choose from, as in
    web pages; and with a context of ``max``, which a coarser cache would only make longer.

    Args:
        unmeasured: makes the problem of a search space, whose losses need not be those of the model.
    """
    asked = request.cache_type or request.cache_type_k or request.cache_type_v
    if asked or request.budget_scope == "file" or request.context == "max":
        return question
    if not checkpoint.shape.generates:
        return question
    caches = resolve(replace(request, cache_type=AUTO), checkpoint).caches
    if len(caches) == 1:
        return question
    space = question.spaces[0]
    if not _gains(unmeasured(space), question, caches):
        return question
    types = cache_names(caches)
    known = known_cache_losses(scores, space)
    if not all(name in known.keys for name in types):
        if not question.calibrate:
            return question
        try:
            measured_cache_losses(checkpoint, scores, space, types, progress)
        except (UnsupportedError, MissingExtraError) as reason:
            logger.info("the KV cache keeps its default type: %s", reason)
            return question
    return replace(question, caches=caches)


def _gains(problem: Problem, question: Question, caches: Sequence[tuple[str, str]]) -> bool:
    """Tell whether a smaller cache than the default one could make a plan better: it takes minutes to measure."""
    rule, scope, memory = question.rule, question.scope, problem.memory
    if question.nbytes is None:
        budget = Budget(problem.floor(scope, rule.at_every_budget(_PROMPT_BATCH)).nbytes, scope)
    else:
        budget = question.budget
    serving = rule.serving(budget, memory)
    if memory.serving(serving).kv_cache < _MUCH * budget.nbytes:
        return False
    if problem.largest(scope, serving).used_bytes <= budget.nbytes:
        return False  # there is room for everything
    rules = (replace(rule, cache_type_k=keys, cache_type_v=values) for keys, values in caches)
    smallest = min((each.serving(budget, memory) for each in rules), key=lambda each: memory.serving(each).total)
    return problem.floor(scope, smallest).nbytes <= budget.nbytes


def chosen_cache_note(problem: Problem, default: Question, plan: Plan) -> tuple[str, ...]:
    """Say so when another type was chosen than the default one, which ``default`` would have had."""
    (own,), serving = default.caches, plan.serving
    if (serving.cache_type_k, serving.cache_type_v) == own:
        return ()
    keys, values = own
    name, budget = cache_types(keys, values), default.budget
    chosen = f"the KV cache is of {serving.cache_types}, the best for this budget: in {name}, the default,"
    floor = problem.floor(budget.scope, default.rule.least.serving(budget, problem.memory)).nbytes
    if floor > budget.nbytes:
        return (f"{chosen} plans begin at {format_bytes(floor)}",)
    nbytes = problem.memory.serving(replace(serving, cache_type_k=keys, cache_type_v=values)).kv_cache
    return (
        f"{chosen} the cache would take {nbytes / plan.budget_bytes:.0%} of the budget;  --cache-type {name}  keeps "
        "the default",
    )


def cache_names(caches: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the types of all pairs, each once."""
    return tuple(dict.fromkeys(name for pair in caches for name in pair))


def known_cache_losses(scores: ScoreFile, space: SearchSpace) -> CacheLosses:
    """Return what was measured of the format's cache types; empty: nothing yet."""
    try:
        runtime = space.format.quantizer()
    except MissingExtraError:
        runtime = ""
    nothing = CacheLosses(space.format.name, runtime, scores.sha256)
    if scores.file is None:
        return scores.cache_losses.get(space.format.name, nothing)
    return load_cache_losses(scores.file, nothing)


def measured_cache_losses(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    space: SearchSpace,
    types: tuple[str, ...],
    progress: ProgressCallback,
) -> CacheLosses:
    """Return the loss of every one of ``types``, measured where it is not known yet.

    An export with the format's most precise weights is run with each type, of keys and of values alone, and compared
    with itself with the default type. Progress says how long the rest takes. Beside a score file is kept what is
    measured so far.

    Raises:
        UnsupportedError: the text that the ranking held out is not here. MissingExtraError: the runtime is not.
    """
    known = known_cache_losses(scores, space)
    own = next(iter(space.format.cache_types))
    changes = tuple(_changes(checkpoint, space, own, [name for name in types if name not in known.keys]))
    if not changes:
        return known
    try:
        windows, text_sha256 = held_out_windows(checkpoint, scores, len(changes), least=_CONTEXT)
    except UnsupportedError as reason:
        raise UnsupportedError(f"--cache-type auto measures what each type costs: {reason}; name a type") from None
    if takes_long(checkpoint, len(changes), windows.numel()):
        logger.warning(
            "measuring what %d types of KV cache cost this model, once; --cache-type %s plans without",
            len(changes),
            own,
        )
    length = windows.shape[1]
    serving = Serving(length, own, min(_PROMPT_BATCH, length), space.backend)
    cache = None if scores.file is None else cache_file(scores.file, space.format.name)
    maker = made_by(known.quantizer, space.backend)
    origin = f"{maker}\nscores {scores.sha256}\ntext {text_sha256}, windows {tuple(windows.shape)}\n{changes}"
    with states_beside(cache, origin, "type") as kept:
        losses = _measured(checkpoint, scores, space, serving, changes, windows, kept, progress)
        found = {"keys": {own: 0.0, **known.keys}, "values": {own: 0.0, **known.values}}
        for (keys, values), loss in zip(changes, losses, strict=True):
            sides = [side for side, name in (("keys", keys), ("values", values)) if name != own]
            for side in sides:
                found[side][keys if side == "keys" else values] = loss / len(sides)
        measured = replace(
            known, text_sha256=text_sha256, tokens=windows.numel(), keys=found["keys"], values=found["values"]
        )
        if scores.file is None:
            scores.cache_losses[space.format.name] = measured
        else:
            save_cache_losses(measured, scores.file)
    return measured


def _measured(
    checkpoint: Checkpoint,
    scores: ScoreFile,
    space: SearchSpace,
    serving: Serving,
    changes: Sequence[tuple[str, str]],
    windows: Tensor,
    kept: KeptStates | None,
    progress: ProgressCallback,
) -> list[float]:
    """Return the divergence that each of ``changes`` causes; ``kept``, read and filled, has that of each window."""
    import torch

    found = torch.zeros(len(windows), len(changes), dtype=torch.float64)
    behind = kept.blocks if kept is not None else 0
    if kept is not None and behind:
        found = kept.restored()["divergences"].clone()
    clock = Clock("KV cache types", found.numel(), progress, done=behind)
    session = space.format.sessions[0]
    with TemporaryDirectory(prefix="acip-export-") as directory:

        def export_of(changed: Serving) -> Path:
            name = changed.cache_type_k if space.format.cache_in_file else serving.cache_type_k
            export = Path(directory) / name
            if not export.exists():
                _most_precise(checkpoint, scores, space, changed, export)
            return export

        for number, window in enumerate(windows.numpy()):
            first = max(0, behind - number * len(changes))
            if first >= len(changes):
                continue
            with session.open(export_of(serving), serving) as opened:
                reference = list(opened.logits(window[None]))
            for index, (keys, values) in enumerate(changes[first:], first):
                changed = replace(serving, cache_type_k=keys, cache_type_v=values)
                with session.open(export_of(changed), changed) as opened:
                    kl = compare_logits(reference, opened.logits(window[None]), ([], [])).mean_kl
                found[number, index] = max(0.0, kl)
                if kept is not None:
                    kept.passed(number * len(changes) + index + 1, {"divergences": found})
                clock.advance()
    losses: list[float] = found.mean(0).tolist()
    return losses


def _changes(checkpoint: Checkpoint, space: SearchSpace, own: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield types of keys and values that tell what each of ``names`` costs: on one side, or where both are of one
    type on both, whose loss then counts half for each."""
    for name in names:
        if name == own:
            continue
        if space.format.refused_cache(checkpoint, name, own):
            yield name, name
        else:
            yield from ((name, own), (own, name))


def _most_precise(checkpoint: Checkpoint, scores: ScoreFile, space: SearchSpace, serving: Serving, out: Path) -> None:
    """Write an export of the dense weights in the most precise type of at most 16 bits."""
    from acip_export.materialization import PlannedModel

    format = space.format
    plain = next((layout for layout in format.layouts if layout.low_rank is None), format.layouts[0])
    types = (next(form for form in map(format.type, format.types) if form.bits_per_weight <= _MOST_BITS),)
    precise = replace(space, layout=plain, types=types, rounding="nearest")
    problem = Problem.of(checkpoint, scores, precise).only(lambda _, decision: decision.rank is None)
    plan = problem.largest("file", serving)
    out.mkdir()
    format.convert(PlannedModel(checkpoint, rounding_scores(checkpoint, scores), plan, format.round_trip), out, silent)
