"""``README.md``: the model card, as Hugging Face reads it. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from acip_export.artifacts.plan import types_used
from acip_export.formats.protocol import RunCommand
from acip_export.formats.registry import export_format
from acip_export.markdown import plain
from acip_export.model.task import Task
from acip_export.report.page import Page
from acip_export.report.rows import Row, file_rows, provenance, runtime_rows
from acip_export.units import format_bytes
from acip_export.version import __version__

# As Hugging Face names tasks.
_PIPELINE_TAGS: Mapping[Task, str] = {
    "causal": "text-generation",
    "embedding": "sentence-similarity",
    "classification": "text-classification",
    "masked-lm": "fill-mask",
}


def render(page: Page, commands: Iterable[RunCommand], chats: bool = False) -> str:
    """The card; ``commands`` run the export. ``chats``: it has a template for conversations."""
    plan, report = page.own.plan, page.own.report
    lines = [*_front_matter(page, chats), "", f"# {plain(plan.model)}, {format_bytes(plan.planned_bytes)}", ""]
    low_rank = sum(d.rank is not None for d in plan.tensors)
    kinds = sorted(types_used(plan.tensors))
    matrices = sum(len(d.shape) == 2 for d in plan.tensors)
    made = "quantized" if not low_rank else f"{low_rank} of {matrices} matrices cut to lower rank, and quantized"
    lines += [
        f"An export of {plain(plan.model)} to {plan.format.upper()}, made by acip-export {__version__} "
        f"([ACIP](https://arxiv.org/abs/2502.01717)): {made} ({', '.join(kinds)}), so that it fits a budget of "
        f"{format_bytes(plan.budget_bytes)} of {plan.budget_scope} at {plan.serving.context} tokens of context. "
        "The figures below were measured on these files; `report.html` shows where the bytes are.",
        "",
        "## Size and quality",
        "",
        *_table(page),
        "",
        "## How to run it",
        "",
        "In this directory:",
        "",
        *(line for command in commands for line in _command(command)),
        "## Limits",
        "",
        f"- The memory figure holds for {plan.serving.context} tokens of context, a KV cache of type "
        f"{plan.serving.cache_types} and prompts in batches of {plan.serving.prompt_batch}; longer contexts need more.",
        *(f"- {plain(note)}" for note in (report.notes if report is not None else ())),
        "- Compression changes what a model says. Quality was measured as given above and nowhere else; what the base "
        "model cannot or must not do holds for this one too.",
    ]
    if report is None:
        lines += ["- These files were not verified in a runtime."]
    elif not report.passed:
        lines += ["- These files failed their verification:", *(f"  - {plain(each)}" for each in report.failures)]
    lines += ["", "## Provenance", ""]
    lines += [f"- {key}: {plain(value)}" for key, value in provenance(page).items()]
    return "\n".join(lines) + "\n"


def _front_matter(page: Page, chats: bool) -> list[str]:
    """YAML whose strings are written as JSON, which YAML includes: no name can break out."""
    plan, ranking = page.own.plan, page.ranking
    hub, license_ = ("", "") if ranking is None else (ranking.hub, ranking.license)
    fields: list[tuple[str, object]] = [
        ("base_model", hub or plan.model),
        ("base_model_relation", "quantized"),
        ("library_name", export_format(plan.format).library),
        ("pipeline_tag", _PIPELINE_TAGS[plan.task]),
        ("license", license_),
        ("quantized_by", "acip-export"),
        ("tags", [*export_format(plan.format).tags, "acip", *(["conversational"] if chats else [])]),
    ]
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields if value), "---"]


def _table(page: Page) -> list[str]:
    lines = ["| | planned | measured | |", "| --- | ---: | ---: | --- |", *map(_row, file_rows(page.own))]
    report = page.own.report
    if report is None:
        return lines
    for runtime in report.runtimes:
        lines.append(f"| **{plain(runtime.runtime)}** | | | |")
        lines += map(_row, runtime_rows(page, report, runtime))
    return lines


def _row(row: Row) -> str:
    return f"| {plain(row.what)} | {row.planned} | {row.found} | {plain(row.note)} |"


def _command(command: RunCommand) -> list[str]:
    note = [f"{plain(command.note)}.", ""] if command.note else []
    return [f"### {plain(command.program)}", "", *note, f"```{command.language}", command.text, "```", ""]
