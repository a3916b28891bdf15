"""The flags of the main job and of ``plan``, which are one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from acip_export.artifacts.plan import BudgetScope
from acip_export.cli.options import BUDGET, CHECK, TARGET, DeviceFile, Model, Scores, type_names
from acip_export.devices import THIS_MACHINE, Device, find_device, load_devices, speeds_of
from acip_export.errors import UsageError
from acip_export.formats.protocol import AUTO
from acip_export.formats.registry import export_format, export_formats, format_names
from acip_export.model.checkpoint import Checkpoint
from acip_export.progress import Course, types_stage
from acip_export.rounding.quantizer import Rounding
from acip_export.units import format_bytes, parse_budgets, parse_context, parse_seconds

if TYPE_CHECKING:
    from acip_export.artifacts.speeds import RuntimeSpeed
    from acip_export.planning import PlanRequest


def _device_names() -> list[str]:
    return [THIS_MACHINE, *load_devices()]


@dataclass(frozen=True)
class PlanFlags:
    """Everything that a plan is asked for with. A field is a flag; :func:`takes_plan_flags` puts them on a command."""

    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            metavar="NAME",
            help=f"File format: {' or '.join(format_names())}.",
            autocompletion=format_names,
            rich_help_panel=TARGET,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Sets format, budget, context and types; this: this machine.\n\n"
            "Flags override them. acip-export devices  lists "
            "what is known; of this machine a model may take half the memory.",
            autocompletion=_device_names,
            rich_help_panel=TARGET,
        ),
    ] = None
    devices: DeviceFile = None
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", metavar="NAME", help="Program that runs it; see  acip-export formats.", rich_help_panel=TARGET
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="NAME",
            help="Layout of the format; auto: the best predicted.",
            rich_help_panel=TARGET,
        ),
    ] = None
    types: Annotated[
        str,
        typer.Option(
            "--types",
            metavar="NAMES",
            help="Types to choose from. Default: device's or format's.",
            rich_help_panel=TARGET,
        ),
    ] = ""
    rounding: Annotated[
        Rounding | None,
        typer.Option(
            metavar="NAME",
            help="nearest, or feedback: errors are made up for (default).\n\n"
            "The error of each weight is carried to those that "
            "are rounded after it, where format and score file allow it.",
            rich_help_panel=TARGET,
        ),
    ] = None
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="4GB, 900M, 2GiB, or 50% of the dense model's bytes.\n\nGiven several times, or as a ladder "
            "(1GB..4GB:5): one export each.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    budget_scope: Annotated[
        BudgetScope | None,
        typer.Option(
            "--budget-scope",
            metavar="SCOPE",
            help="memory (default); process; anonymous; file.\n\n"
            "memory: files, cache and buffers; process, the default of "
            "--device: all that the runtime holds; anonymous: what of that the system cannot drop, so no mapped "
            "weights; file: only the files.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="8192, 8k or max. Default: the model's, up to 4096.\n\n"
            "max: the longest that fits, in steps of 256, with a predicted loss of at most --max-loss, or 0.01 nats "
            "more than with 256 tokens. Several, '2k;8k', are lines of a --sweep.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="NATS", help="Predicted loss that --context max may have.", rich_help_panel=BUDGET),
    ] = None
    min_speed: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS/S",
            help="Least predicted speed of an answer, context full.\n\nOn the device as reported, or on this machine "
            "after  acip-export calibrate.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    cache_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Type of the KV cache; auto: loses least.\n\nacip-export formats  lists them. auto measures once what "
            "each costs, in the runtime on held-out text: a few seconds a type and 100 million parameters. Default: "
            "the format's; auto where that takes a tenth of the budget.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    cache_type_k: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the cached keys alone.", rich_help_panel=BUDGET)
    ] = None
    cache_type_v: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Type of the cached values alone.", rich_help_panel=BUDGET)
    ] = None
    # Of optimum's command line: what is exported there is for a program that makes its cache itself.
    own_cache: Annotated[bool, typer.Option("--own-cache", hidden=True)] = False
    prompt_batch: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Prompt tokens at once. Default: suits the budget.", rich_help_panel=BUDGET
        ),
    ] = None
    model: Model = "."
    scores: Scores = None
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="cpu (the default), mobile, webgpu, cuda, dml, qnn-friendly.",
            rich_help_panel="ONNX",
        ),
    ] = None
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Measure what rounding costs, layer by layer (default).\n\nPredictions are scaled to it. "
            "The first plan of a format then takes minutes.",
            rich_help_panel=CHECK,
        ),
    ] = True
    candidates: Annotated[
        int,
        typer.Option(
            min=1,
            max=16,
            metavar="N",
            help="Run N plans, keep the best (default 1).\n\nOn text that the ranking held out, each a pass; 1: the "
            "prediction alone.",
            rich_help_panel=CHECK,
        ),
    ] = 1
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Tune scales, norms and factor pairs for so long: 10min.\n\nGradient descent towards the dense model, "
            "on the ranking's text, before the export is written; its bytes stay. Left out where it does not help.",
            rich_help_panel=TARGET,
        ),
    ] = None
    # What only one format understands, as typed: a flag for every option of an installed format.
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str | Path | None, ...]:
        """The files that are named, among other settings; outputs must be none of them."""
        return self.scores, self.devices, *self.options.values()

    @property
    def asks(self) -> bool:
        """Whether anything was asked for at all."""
        return bool(self.budget) or (self.device or self.format_) is not None

    @property
    def course(self) -> Course:
        """What a first plan measures of a model, and roughly what each takes; later ones find it beside the scores."""
        caches = self.cache_type, self.cache_type_k, self.cache_type_v
        # Where nothing was asked of the cache, its types are measured first, if at all.
        chosen = self.calibrate and not self.own_cache and not any(caches)
        shares = {"KV cache types": 1.0} if chosen else {}
        shares.update(dict.fromkeys(map(types_stage, self._formats(self._device())), 1.0))
        if self.calibrate:
            shares.update({"calibrate layers": 2.0, "calibrate": 2.0})
        if AUTO in caches:
            shares["KV cache types"] = 1.0
        if self.candidates > 1:
            shares["compare plans"] = 0.2 * self.candidates
        return Course(shares)

    def request(self) -> PlanRequest:
        """The flags as one request, completed from the device.

        Raises:
            UsageError: a flag is missing or malformed, or flags contradict each other. DeviceFileError.
        """
        request, *others = self.requests()
        if others:
            raise UsageError("one plan is for one --budget; several are for exports, and  --sweep  draws all of them")
        return request

    def requests(self) -> tuple[PlanRequest, ...]:
        """The flags as one request a budget.

        Raises:
            As :meth:`request`.
        """
        device = self._device()
        format_name = self._format(device)
        (types,), (context,) = self._type_sets(1), self._contexts(1)
        budgets = self._budgets(device)
        speeds = speeds_of(device, needed=self.min_speed is not None)
        return tuple(
            self._request(device, format_name, budget, self.layout, types, context, speeds) for budget in budgets
        )

    def sweep_requests(self) -> list[tuple[str, PlanRequest]]:
        """One request for every line of a sweep, labelled: formats, layouts, sets of types and contexts.

        What was not named is every format and layout, the format's types, and one context.

        Raises:
            UsageError: as :meth:`request`, or a budget. UnsupportedError: no such layout or runtime.
        """
        if self.budget:
            raise UsageError("--sweep plans for every budget; leave --budget out")
        if self.min_speed is not None:
            raise UsageError("--sweep shows the speed of every size; leave --min-speed out")
        contexts = self._contexts(None)
        if "max" in contexts:
            raise UsageError("--sweep plans for one context at every budget; name it, or several:  --context '2k;8k'")
        device = self._device()
        speeds = speeds_of(device, needed=False)
        requests = []
        for name in self._formats(device):
            for layout in export_format(name).layouts_for(self.layout or AUTO, self.runtime):
                for types, context in product(self._type_sets(None), contexts):
                    label = f"{name}, {layout.name}" + (f": {', '.join(types)}" if types else "")
                    label += f", {context:,} tokens" if len(contexts) > 1 else ""
                    requests.append((label, self._request(device, name, None, layout.name, types, context, speeds)))
        return requests

    def _contexts(self, most: int | None) -> list[int | Literal["max"] | None]:
        if self.context is None:
            return [None]
        contexts = [parse_context(listed) for listed in self.context.split(";")]
        if most is not None and len(contexts) > most:
            raise UsageError(f"--context {self.context!r} has several; they are the lines of a  --sweep")
        return list(contexts)

    def _type_sets(self, most: int | None) -> list[tuple[str, ...]]:
        sets = [type_names(listed) for listed in self.types.split(";")]
        if most is not None and len(sets) > most:
            raise UsageError(f"--types {self.types!r} has several sets; they are the lines of a  --sweep")
        return sets

    def _request(
        self,
        device: Device | None,
        format_name: str,
        budget: int | None,
        layout: str | None,
        types: tuple[str, ...],
        context: int | Literal["max"] | None,
        speeds: Mapping[str, RuntimeSpeed],
    ) -> PlanRequest:
        from acip_export.planning import DEFAULT_CONTEXT, PlanRequest

        if self.prompt_batch is not None and not 1 <= self.prompt_batch < 2**31:
            raise UsageError(f"--prompt-batch {self.prompt_batch} must be at least 1, and less than 2^31")
        if device is not None and not types:
            types = device.types.get(format_name, ())
        return PlanRequest(
            format=format_name,
            budget_bytes=budget,
            budget_scope=self.budget_scope or ("memory" if device is None else "process"),
            runtime=self.runtime if self.runtime or device is None else device.runtimes.get(format_name),
            backend=self.backend and self.backend.lower(),
            layout=layout and layout.lower(),
            types=types,
            context=context,
            max_loss=self.max_loss,
            cache_type=self.cache_type and self.cache_type.lower(),
            cache_type_k=self.cache_type_k and self.cache_type_k.lower(),
            cache_type_v=self.cache_type_v and self.cache_type_v.lower(),
            prompt_batch=self.prompt_batch,
            default_context=DEFAULT_CONTEXT if device is None else device.context,
            device=None if device is None else device.name,
            whole_prompts=device is not None and format_name in device.whole_prompts,
            own_cache=self.own_cache,
            largest_file=None if device is None else device.largest_file,
            rounding=self.rounding,
            calibrate=self.calibrate,
            candidates=self.candidates,
            speeds=speeds,
            min_speed=self.min_speed,
            tune_seconds=None if self.tune is None else parse_seconds(self.tune, "--tune"),
            options=self._options(format_name),
        )

    def _options(self, format_name: str) -> dict[str, str]:
        """Return the options as a plan stores them.

        An option that the format does not have is kept as typed: planning refuses it by name.
        """
        known = {option.name: option.parse for option in export_format(format_name).options}
        return {name: known.get(name, str)(text) for name, text in self.options.items()}

    def _device(self) -> Device | None:
        if self.device is None:
            if self.devices is not None:
                raise UsageError("--devices FILE only adds devices to choose from; choose one with  --device NAME")
            return None
        return find_device(self.device, load_devices(self.devices))

    def _formats(self, device: Device | None) -> Sequence[str]:
        """Return the formats of a sweep."""
        return [self._format(device)] if self.format_ or device else format_names()

    def _format(self, device: Device | None) -> str:
        if self.format_ is None:
            if device is None:
                raise UsageError(f"no format; choose one with  --format {'|'.join(format_names())}")
            return device.default_format
        name = self.format_.lower()
        if device is not None and name in format_names() and name not in device.runtimes:
            raise UsageError(
                f"{device.name} runs {' and '.join(device.runtimes)}, not {name}; leave --format or --device out"
            )
        return name

    def _budgets(self, device: Device | None) -> tuple[int, ...]:
        if not self.budget:
            if device is None:
                raise UsageError(
                    "no budget; give one with  --budget 4GB,  or name a device with  --device raspberry-pi-5-8gb\n"
                    "acip-export devices  lists them"
                )
            return (device.budget_bytes,)
        budgets = parse_budgets(self.budget, lambda: Checkpoint.open(self.model).weight_bytes)
        if device is not None and self.budget_scope != "file" and max(budgets) > device.memory_bytes:
            raise UsageError(
                f"--budget {' '.join(self.budget)} is more than {device.name} has: "
                f"{format_bytes(device.memory_bytes)} ({device.memory_bytes:,} bytes)"
            )
        return budgets


def plan_flags(values: dict[str, Any]) -> tuple[PlanFlags, tuple[str, ...]]:
    """Take out of a command's parameters those of :class:`PlanFlags`, and the names of the companions asked for."""
    options = [option.name for known in export_formats() for option in known.options]
    given = {name: text for name in options if (text := values.pop(name, None)) is not None}
    shared = [each.name for each in fields(PlanFlags) if each.name != "options"]
    flags = PlanFlags(**{name: values.pop(name) for name in shared}, options=given)
    companions = dict.fromkeys(each.name for known in export_formats() for each in known.companions)
    return flags, tuple(name for name in companions if values.pop(name, False))


def takes_plan_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every flag of :class:`PlanFlags`, passed as its parameter ``flags``.

    Typer reads signatures, so the command gets one in which the fields, and a flag for every option of an installed
    format, stand in place of ``flags``; and one for every companion in place of ``companions``, the names of those
    that were asked for.
    """
    hints = get_type_hints(PlanFlags, include_extras=True)
    shared = [
        _flag(each.name, hints[each.name], inspect.Parameter.empty if each.default is MISSING else each.default)
        for each in fields(PlanFlags)
        if each.name != "options"
    ]
    options = {option.name: (option, known) for known in export_formats() for option in known.options}
    companions = {companion.name: (companion, known) for known in export_formats() for companion in known.companions}
    of_formats = [
        _flag(
            option.name,
            Annotated[
                str | None,
                typer.Option(option.flag, help=option.help, metavar=option.metavar, rich_help_panel=known.name.upper()),
            ],
        )
        for option, known in options.values()
    ]
    of_companions = [
        _flag(
            companion.name,
            Annotated[
                bool,
                typer.Option(f"--{companion.name}", help=companion.help, rich_help_panel=known.name.upper()),
            ],
            False,
        )
        for companion, known in companions.values()
    ]
    own = inspect.signature(command, eval_str=True)
    takes_companions = "companions" in own.parameters
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        if parameter.name == "flags":
            parameters += [*shared, *of_formats]
        elif parameter.name == "companions":
            parameters += of_companions
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def wrapper(**values: Any) -> None:
        flags, asked = plan_flags(values)
        if takes_companions:
            values["companions"] = asked
        command(flags=flags, **values)

    del wrapper.__wrapped__  # its annotations would hide the new ones
    wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return wrapper


def _flag(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
