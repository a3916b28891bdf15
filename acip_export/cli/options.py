"""Flags that several commands share. Those of the main job and of ``plan`` are one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from acip_export.artifacts.plan import BudgetScope
from acip_export.devices import Device, find_device, load_devices
from acip_export.errors import UsageError
from acip_export.formats.targets import AUTO, TARGETS
from acip_export.formats.targets import target as find_target
from acip_export.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from acip_export.planning import PlanRequest

Model = Annotated[str, typer.Option("--model", "-m", help="Model directory or Hugging Face id.", show_default=True)]
Scores = Annotated[Path | None, typer.Option(help="Score file. Default: the *.acip beside the model.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what acip-export wrote there.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Directory that keeps the SVDs, for other sizes and rankings.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line per tensor.")]
Text = Annotated[Path | None, typer.Option("--text", help="Text to measure perplexity and divergence on.")]
Tasks = Annotated[
    str, typer.Option("--tasks", help="Tasks of lm-evaluation-harness, by comma: names, or YAML files of your own.")
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds that a runtime may take for one context.", min=0.1)]
DeviceFile = Annotated[
    Path | None, typer.Option("--devices", metavar="FILE", help="More devices; see  acip-export devices --help.")
]


def names(listed: str) -> tuple[str, ...]:
    """The names of a flag that takes several, by comma."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())


@dataclass(frozen=True)
class PlanFlags:
    """Everything that a plan is asked for with. A field is a flag; :func:`takes_plan_flags` puts them on a command."""

    model: Model = "."
    scores: Scores = None
    budget: Annotated[str | None, typer.Option(help="Bytes with a unit: 4GB, 900MB, 2GiB.")] = None
    device: Annotated[
        str | None,
        typer.Option("--device", help="Sets budget, format, context and types; flags override. See  devices."),
    ] = None
    devices: DeviceFile = None
    budget_scope: Annotated[
        BudgetScope | None,
        typer.Option(
            "--budget-scope",
            help="What the budget covers: files, cache and buffers (memory, the default); the runtime too (process, "
            "the default of --device); only files.",
        ),
    ] = None
    format_: Annotated[str | None, typer.Option("--format", "-f", help="Target: gguf or onnx.")] = None
    runtime: Annotated[str | None, typer.Option("--runtime", help="What will run it; see  acip-export formats.")] = None
    backend: Annotated[
        str | None, typer.Option("--backend", help="ONNX: cpu (the default), mobile, webgpu, cuda, dml, qnn-friendly.")
    ] = None
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="Layout of the target; auto: the best predicted that the runtime runs."),
    ] = None
    types: Annotated[
        str, typer.Option("--types", help="Types to choose from, by comma. Default: the device's or the target's.")
    ] = ""
    context: Annotated[
        int | None, typer.Option(help="Tokens of KV cache. Default: the model's, at most 4096 or the device's.")
    ] = None
    cache_type: Annotated[str | None, typer.Option(help="Type of the KV cache.")] = None
    prompt_batch: Annotated[
        int | None, typer.Option(help="Prompt tokens processed together. Default: suits the budget.")
    ] = None
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="GGUF: llama.cpp's name of the pre-tokenizer, where it is not recognised.")
    ] = None
    base_gguf: Annotated[
        Path | None,
        typer.Option(help="GGUF: the same model as llama.cpp's own converter wrote it, for architectures not known."),
    ] = None

    imatrix: Annotated[
        Path | None,
        typer.Option(help="GGUF: llama.cpp's importance matrix, to round with in place of the score file's moments."),
    ] = None

    split_max_size: Annotated[
        str | None,
        typer.Option(help="GGUF: a model in several files of at most this size (2GB); llama.cpp opens the first."),
    ] = None

    @property
    def inputs(self) -> tuple[Path | None, ...]:
        """The files that are named; outputs must be none of them."""
        return self.scores, self.devices, self.base_gguf, self.imatrix

    @property
    def asks(self) -> bool:
        """Whether anything was asked for at all."""
        return (self.budget or self.device or self.format_) is not None

    def request(self) -> PlanRequest:
        """The flags as one request, completed from the device.

        Raises:
            UsageError: a flag is missing or malformed, or flags contradict each other. DeviceFileError.
        """
        device = self._device()
        target = self._target(device)
        (types,) = self._type_sets(1)
        return self._request(device, target, self._budget(device), self.layout, types)

    def sweep_requests(self) -> list[tuple[str, PlanRequest]]:
        """One request for every line of a sweep, labelled: targets, layouts and sets of types, all that were not named.

        Raises:
            UsageError: as :meth:`request`, or a budget. UnsupportedError: no such layout or runtime.
        """
        if self.budget is not None:
            raise UsageError("--sweep plans for every budget; leave --budget out")
        device = self._device()
        targets = [self._target(device)] if self.format_ or device else list(TARGETS)
        sets, found = self._type_sets(None), []
        for target in targets:
            if target not in TARGETS:
                find_target(target)  # says what is known
            for layout in TARGETS[target].layouts_for(self.layout or AUTO, self.runtime):
                for types in sets:
                    label = f"{target}, {layout.name}" + (f": {', '.join(types)}" if types else "")
                    found.append((label, self._request(device, target, 1, layout.name, types)))
        return found

    def _type_sets(self, most: int | None) -> list[tuple[str, ...]]:
        sets = [
            tuple(name.strip().lower() for name in names.split(",") if name.strip()) for names in self.types.split(";")
        ]
        if most is not None and len(sets) > most:
            raise UsageError(f"--types {self.types!r} has several sets; they are the lines of a  --sweep")
        return sets

    def _request(
        self, device: Device | None, target: str, budget: int, layout: str | None, types: tuple[str, ...]
    ) -> PlanRequest:
        from acip_export.planning import DEFAULT_CONTEXT, PlanRequest

        if self.prompt_batch is not None and self.prompt_batch < 1:
            raise UsageError(f"--prompt-batch {self.prompt_batch} must be at least 1")
        if device is not None and not types:
            types = device.types.get(target, ())
        return PlanRequest(
            format=target,
            budget_bytes=budget,
            budget_scope=self.budget_scope or ("memory" if device is None else "process"),
            runtime=self.runtime if self.runtime or device is None else device.runtimes.get(target),
            backend=self.backend,
            layout=layout,
            types=types,
            context=self.context,
            cache_type=self.cache_type,
            prompt_batch=self.prompt_batch,
            default_context=DEFAULT_CONTEXT if device is None else device.context,
            device=None if device is None else device.name,
            whole_prompts=device is not None and target in device.whole_prompts,
            largest_file=None if device is None else device.largest_file,
            options=self._options(),
        )

    def _options(self) -> dict[str, str]:
        """What only one target's converter understands."""
        files = {"base_gguf": self.base_gguf, "imatrix": self.imatrix}
        given = {"pre_tokenizer": self.pre_tokenizer} | {
            name: None if file is None else str(file.resolve()) for name, file in files.items()
        }
        if self.split_max_size is not None:
            given["split_max_size"] = str(parse_bytes(self.split_max_size, "--split-max-size"))
        return {name: value for name, value in given.items() if value is not None}

    def _device(self) -> Device | None:
        if self.device is None:
            if self.devices is not None:
                raise UsageError("--devices FILE only adds devices to choose from; choose one with  --device NAME")
            return None
        return find_device(self.device, load_devices(self.devices))

    def _target(self, device: Device | None) -> str:
        if self.format_ is None:
            if device is None:
                raise UsageError(f"no target; choose one with  --format {'|'.join(TARGETS)}")
            return device.default_format
        if device is not None and self.format_ in TARGETS and self.format_ not in device.runtimes:
            raise UsageError(
                f"{device.name} runs {' and '.join(device.runtimes)}, not {self.format_}; "
                "leave --format or --device out"
            )
        return self.format_

    def _budget(self, device: Device | None) -> int:
        if self.budget is None:
            if device is None:
                raise UsageError(
                    "no budget; give one with  --budget 4GB,  or name a device with  --device raspberry-pi-5-8gb\n"
                    "acip-export devices  lists them"
                )
            return device.budget_bytes
        budget = parse_bytes(self.budget)
        if device is not None and self.budget_scope != "file" and budget > device.memory_bytes:
            raise UsageError(
                f"--budget {self.budget} is more than {device.name} has: {format_bytes(device.memory_bytes)} "
                f"({device.memory_bytes} bytes)"
            )
        return budget


def takes_plan_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every flag of :class:`PlanFlags`, passed as its parameter ``flags``.

    Typer reads signatures, so the command gets one in which the fields stand in place of ``flags``.
    """
    hints = get_type_hints(PlanFlags, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(PlanFlags)
    ]
    own = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        if parameter.name == "flags":
            parameters += shared
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def wrapper(**values: Any) -> None:
        flags = PlanFlags(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        command(flags=flags, **values)

    del wrapper.__wrapped__  # its annotations would hide the new ones
    wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return wrapper
