"""What is known of a device: how much memory a model may take there, and what runs it fast."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from acip_export.artifacts.plan import BudgetScope, Plan, types_used
from acip_export.artifacts.speeds import RuntimeSpeed
from acip_export.devices.reports import Chip
from acip_export.formats.registry import export_format

BUILT_IN = "built in"


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: phone, board, laptop, browser and so on.
        memory_bytes: all of it. usable: the share that one process can have.
        runtimes: what runs each format there; the first format is the default.
        types: weight types that are fast there, by format, most precise first.
        context: tokens that a plan is made for unless told otherwise.
        sources: where ``memory``, ``usable`` and ``types`` come from.
        largest_file: bytes of the largest file that can be loaded there; ``None``: any.
        whole_prompts: formats whose runtime there computes a prompt in one piece, however long it is.
        enforces: the scope of what its system ends processes for; ``None``: not known.
        chip: what computes there, and how fast people reported it to be; ``None``: not known.
        speeds: the table that ``acip-export calibrate`` made there, which counts more than reports; ``None``:
            nobody has.
        defined_in: the file, or ``built in``.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int
    usable: Fraction
    runtimes: dict[str, str]
    types: dict[str, tuple[str, ...]]
    context: int
    sources: dict[str, str]
    largest_file: int | None = None
    whole_prompts: tuple[str, ...] = ()
    enforces: BudgetScope | None = None
    chip: Chip | None = None
    speeds: Path | None = None
    defined_in: str = BUILT_IN

    @property
    def budget_bytes(self) -> int:
        """What a model with its runtime may take."""
        return int(self.memory_bytes * self.usable)

    @property
    def default_format(self) -> str:
        return next(iter(self.runtimes))

    def obstacle(self, plan: Plan) -> str | None:
        """Say in a few words why an export cannot run here; ``None``: its process stays within the budget."""
        if plan.format not in self.runtimes:
            return f"no runtime for {plan.format}"
        if plan.process_bytes > self.budget_bytes:
            return "less memory"
        if self.largest_file is not None and max(plan.files.values()) > self.largest_file:
            return "no file as large"
        if plan.format in self.whole_prompts and plan.serving.prompt_batch < plan.serving.context:
            return "prompts in one piece, which it was not planned for"
        serving = plan.serving
        if plan.format in self.whole_prompts and not export_format(plan.format).made_by_programs(
            serving.cache_type_k, serving.cache_type_v
        ):
            return f"no KV cache of {serving.cache_types}"
        return None

    def reported_speeds(self) -> dict[str, RuntimeSpeed]:
        """Return what reports say of its runtimes, for the types that plans for it choose from."""
        if self.chip is None:
            return {}
        formats = [export_format(name) for name in self.runtimes]
        types = {}
        for each in formats:
            chosen = self.types.get(each.name, (*each.types, *each.embedding_types, *each.narrow_types))
            below_adapters = [layout.base_type for layout in each.layouts if layout.base_type is not None]
            types[each.name] = [each.type(name) for name in (*chosen, *below_adapters)]
        return self.chip.speeds(types)

    def slow_types(self, plan: Plan) -> tuple[str, ...]:
        """Return types of the export's matrices that are not among the fast ones here."""
        used = types_used(tensor for tensor in plan.tensors if len(tensor.shape) == 2)
        return tuple(sorted(used - set(self.types.get(plan.format, used))))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "class": self.kind,
            "memory_bytes": self.memory_bytes,
            "usable": float(self.usable),
            "budget_bytes": self.budget_bytes,
            "runtimes": self.runtimes,
            "types": {format: list(types) for format, types in self.types.items()},
            "context": self.context,
            "largest_file": self.largest_file,
            "whole_prompts": list(self.whole_prompts),
            "enforces": self.enforces,
            "chip": None if self.chip is None else self.chip.to_json(),
            "speeds": None if self.speeds is None else str(self.speeds),
            "source": self.sources,
            "defined_in": self.defined_in,
        }
