"""What a user asks for, and what it means for a model: resolved here, once, before anything is planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf
from typing import Literal, get_args

from acip_export.artifacts.plan import BudgetScope, cache_types
from acip_export.artifacts.speeds import RuntimeSpeed
from acip_export.choices import instead_of
from acip_export.errors import UnsupportedError, UsageError
from acip_export.formats.protocol import AUTO, DEFAULT_BACKEND, ExportFormat
from acip_export.formats.registry import export_format, export_formats
from acip_export.model.checkpoint import Checkpoint
from acip_export.planning.budget import Budget, ServingRule
from acip_export.planning.space import SearchSpace
from acip_export.planning.speed import Pace
from acip_export.rounding.quantizer import Rounding

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks for. Everything but the format may be left out.

    Attributes:
        format: the name of a file format.
        budget_bytes: the most that the plan may take; ``None``: no single budget, as for a sweep of all of them.
        budget_scope: what the budget covers: all of the process, what of it the system cannot drop, what it holds for
            this model, or the files.
        runtime: a runtime of the format; ``None``: its default.
        backend: what computes the export (``cpu``, ``webgpu``, ...); ``None``: the format's default.
        layout: a layout of the format; ``auto``: every one that the runtime runs; ``None``: the runtime's default.
        types: names of the weight types to choose from; empty: the format's defaults.
        context: tokens; ``None``: the model's, at most ``default_context``; ``max``: the longest that fits the budget.
        max_loss: the most predicted loss that the longest context may have; ``None``: 0.01 nats more than the shortest.
        cache_type: of the whole KV cache; ``auto``: what loses least together with the weights, see
            :func:`acip_export.api.cache_types.measured_cache_losses`; ``None``: the format's default, or ``auto``, see
            :func:`acip_export.api.cache_types.with_cache_to_choose`. cache_type_k, cache_type_v: of its keys or values
            alone.
        prompt_batch: prompt tokens that are computed together; ``None``: chosen to suit the budget.
        default_context: the most tokens of context that are planned for without being asked.
        device: the name of the device that the budget is of, if it is of one.
        whole_prompts: prompts are computed in one piece, whatever their length; then the prompt batch is the context.
        own_cache: the program that it is for makes the KV cache itself, as optimum does, and web pages (which have
            :attr:`whole_prompts`): no type is chosen or suggested that it does not make.
        largest_file: bytes of the largest file that can be loaded; ``None``: any.
        options: for the format; :attr:`acip_export.formats.protocol.ExportFormat.options` names them.
        rounding: how codes are chosen; ``None``: the better way that the score file allows, see
            :func:`acip_export.api.rounding_errors.settle_rounding`.
        calibrate: predicted losses are scaled to what was measured, which is measured where it was not yet, see
            :func:`acip_export.api.calibration.calibrated_errors`.
        candidates: plans that are compared by measuring before one is chosen; 1: the prediction alone chooses.
        speeds: of the machine that is planned for, by runtime. min_speed: tokens a second that an answer must have.
        tune_seconds: for how long an export is tuned before it is written; ``None``: not at all.
    """

    format: str
    budget_bytes: int | None = None
    budget_scope: BudgetScope = "memory"
    runtime: str | None = None
    backend: str | None = None
    layout: str | None = None
    types: tuple[str, ...] = ()
    context: int | Literal["max"] | None = None
    max_loss: float | None = None
    cache_type: str | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    prompt_batch: int | None = None
    default_context: int = DEFAULT_CONTEXT
    device: str | None = None
    whole_prompts: bool = False
    own_cache: bool = False
    largest_file: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    rounding: Rounding | None = None
    calibrate: bool = False
    candidates: int = 1
    speeds: Mapping[str, RuntimeSpeed] = field(default_factory=dict)
    min_speed: float | None = None
    tune_seconds: float | None = None


@dataclass(frozen=True)
class Question:
    """A request in the planner's terms, with every name looked up and every default filled in.

    Attributes:
        spaces: one for each layout to plan for.
        rule: the serving settings, up to what depends on the budget.
        scope: what a budget covers.
        nbytes: the budget's; ``None``: the question is about all budgets.
        calibrate: as :attr:`PlanRequest.calibrate`.
        caches: the types of keys and values to choose from; ``rule`` has the first.
        pace: how fast plans will be, and must be; ``None``: nothing is known of it.
    """

    spaces: tuple[SearchSpace, ...]
    rule: ServingRule
    scope: BudgetScope
    nbytes: int | None
    calibrate: bool
    caches: tuple[tuple[str, str], ...]
    pace: Pace | None = None

    @property
    def space(self) -> SearchSpace:
        """The only search space.

        Raises:
            UsageError: the layout ``auto`` stands for several.
        """
        space, *others = self.spaces
        if others:
            names = ", ".join(each.layout.name for each in self.spaces)
            raise UsageError(f"one plan is for one layout: {names}")
        return space

    @property
    def budget(self) -> Budget:
        """The budget.

        Raises:
            UsageError: the request has none.
        """
        if self.nbytes is None:
            raise UsageError("no budget; give one with  --budget 4GB")
        return Budget(self.nbytes, self.scope)


def resolve(request: PlanRequest, checkpoint: Checkpoint) -> Question:
    """Look up what ``request`` names and settle what it leaves open, for one model.

    Raises:
        UnsupportedError: no such format, backend, runtime, layout, type or option.
        UsageError: no such scope, or the model cannot be served with these settings.
    """
    scopes = get_args(BudgetScope)
    if request.budget_scope not in scopes:
        raise UsageError(f"a budget's scope is {request.budget_scope!r}, expected {', '.join(scopes)}")
    format = export_format(request.format, request.backend)
    if request.whole_prompts or request.own_cache:
        format = _with_own_caches(format, request)
    format.check_options(request.options)
    format = format.without(format.unknown_types(request.options))
    if request.min_speed is not None:
        format = format.without(_untimed(request, format))
    backend = request.backend or DEFAULT_BACKEND
    types = format.choose_types(request.types)
    spaces = tuple(
        SearchSpace(format, layout, types, backend, request.options, request.rounding or "nearest")
        for layout in format.layouts_for(request.layout, request.runtime)
    )
    caches = _cache_types(request, format, checkpoint)
    return Question(
        spaces,
        _rule(request, caches[0], format, backend, checkpoint),
        request.budget_scope,
        request.budget_bytes,
        request.calibrate,
        caches,
        _pace(request, format, checkpoint),
    )


def _pace(request: PlanRequest, format: ExportFormat, checkpoint: Checkpoint) -> Pace | None:
    """Return what is known of the format's runtime.

    Raises:
        UsageError: a speed is asked for, and none can be predicted.
    """
    least = request.min_speed
    if least is not None and not 0 < least < inf:
        raise UsageError(f"--min-speed {least:g} must be more than 0 tokens a second")
    if least is not None and not checkpoint.shape.generates:
        raise UsageError("--min-speed is of answers, and this model writes none")
    if least is not None and request.candidates > 1:
        raise UsageError("--candidates compares plans of any speed; leave out  --candidates  or  --min-speed")
    runtime = _timed_runtime(request, format)
    speeds = request.speeds.get(runtime) if request.backend in (None, DEFAULT_BACKEND) else None
    if speeds is None and least is not None:
        where = "this machine" if request.device is None else request.device
        told = "" if request.device is None else ", or list what was reported of its chip (docs/devices.md)"
        known = [each.name for each in export_formats() if request.speeds.keys() & set(each.timed_runtimes)]
        instead = f".\nThey are known of  --format {known[0]}" if known else ""
        raise UsageError(
            f"--min-speed needs the speeds of {where} with {runtime}, which nobody has measured; measure them there "
            f"with  acip-export calibrate{told}{instead}"
        )
    return None if speeds is None else Pace(runtime, speeds, least)


def _untimed(request: PlanRequest, format: ExportFormat) -> dict[str, str]:
    """Return types that are newer than the speeds that are known, and why they are left out of plans for a speed."""
    speeds = request.speeds.get(_timed_runtime(request, format))
    new = [type_.name for type_ in format.weight_types if type_.since and type_.name not in format.refused]
    return {
        name: "its speed was not measured, and --min-speed needs it; measure again with  acip-export calibrate"
        for name in new
        if speeds is not None and name not in speeds.matrices
    }


def _timed_runtime(request: PlanRequest, format: ExportFormat) -> str:
    """Return the runtime whose speed a plan says: where the default one is meant, what people talk to, if measured."""
    default = next(iter(format.runtimes))
    if request.runtime not in (None, default):
        return str(request.runtime)
    names = format.timed_runtimes
    return next((name for name in names if name in request.speeds), names[0])


def _rule(
    request: PlanRequest, cache: tuple[str, str], format: ExportFormat, backend: str, checkpoint: Checkpoint
) -> ServingRule:
    encoder = checkpoint.encoder
    longest = format.longest_context(checkpoint.shape) if encoder is None else encoder.max_length
    to_find = request.context == "max"
    if to_find and encoder is not None:
        raise UsageError("--context max is for models that generate; an encoder keeps nothing of the texts before")
    if request.max_loss is not None and not (to_find and request.max_loss > 0):
        raise UsageError(f"--max-loss {request.max_loss:g} is the most that  --context max  may lose, above 0")
    if isinstance(request.context, int):
        context = request.context
    else:
        context = longest if to_find else min(longest, request.default_context)
    if not 0 < context <= longest:
        why = (
            ""
            if encoder is not None or longest == checkpoint.shape.max_context
            else f"; {format.name} has no sliding window for it"
        )
        raise UsageError(f"--context {context} is outside what the model was made for: 1 to {longest} tokens{why}")
    keys, values = cache
    if encoder is not None and request.prompt_batch is not None and request.prompt_batch < context:
        raise UsageError(
            f"--prompt-batch {request.prompt_batch} is less than a text of --context {context} tokens, which an "
            "encoder reads in one piece; give more, or a shorter --context"
        )
    whole = request.whole_prompts or encoder is not None
    return ServingRule(context, keys, backend, request.prompt_batch, whole, values, to_find, request.max_loss)


def _with_own_caches(format: ExportFormat, request: PlanRequest) -> ExportFormat:
    """Return the format with those KV caches alone that its programs make: nothing else may be chosen or suggested.

    Raises:
        UnsupportedError: another one is asked for.
    """
    own = {name: size for name, size in format.cache_types.items() if format.made_by_programs(name, name)}
    where = request.device or ("a web page" if request.whole_prompts else "optimum")
    for name in (request.cache_type, request.cache_type_k, request.cache_type_v):
        if name in format.cache_types and name not in own:
            raise UnsupportedError(
                f"no KV cache of {name} in {where}: what runs {format.name} there makes its "
                f"cache in {' or '.join(own)}; leave the cache's type out"
            )
    return replace(format, cache_types=own)


def _cache_types(request: PlanRequest, format: ExportFormat, checkpoint: Checkpoint) -> tuple[tuple[str, str], ...]:
    """Return the types of keys and values, every pair of them where they are to be chosen.

    Raises:
        UsageError: the flags contradict each other.
        UnsupportedError: the format has no such type, or what runs it refuses them for this model.
    """
    both, one_sided = request.cache_type, (request.cache_type_k, request.cache_type_v)
    if both and any(one_sided):
        raise UsageError(
            f"--cache-type {both} is of keys and values; leave it out, or  --cache-type-k  and  --cache-type-v"
        )
    default = both or next(iter(format.cache_types))
    keys, values = (name or default for name in one_sided)
    if AUTO in (keys, values) and not checkpoint.shape.generates:
        raise UsageError("--cache-type auto is for models that generate; an encoder keeps no KV cache")
    every_key, every_value = (tuple(format.cache_types) if name == AUTO else (name,) for name in (keys, values))
    for name in (*every_key, *every_value):
        if name not in format.cache_types:
            known = instead_of(name, (*format.cache_types, AUTO))
            raise UnsupportedError(f"{format.name} has no KV cache type {name!r}; {known}")
    pairs = list(product(every_key, every_value))
    possible = tuple(
        pair for pair in pairs if not checkpoint.shape.generates or not format.refused_cache(checkpoint, *pair)
    )
    if not possible:
        raise UnsupportedError(
            f"no KV cache of {cache_types(*pairs[0])}: {format.refused_cache(checkpoint, *pairs[0])}"
        )
    return possible
