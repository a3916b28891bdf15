"""Print what a verification measured, and how to run an export."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from acip_export.cli import output as console
from acip_export.cli.tables.common import plain_table
from acip_export.units import format_bytes, format_nats

if TYPE_CHECKING:
    from acip_export.artifacts.plan import Plan
    from acip_export.artifacts.report import Report, RuntimeReport, Speed

_SCOPES = {
    "file": "files alone",
    "memory": "files, caches and buffers in memory",
    "process": "the whole process",
    "anonymous": "what of the process the system cannot drop",
}
# What a process holds beside what the budget is for.
_BESIDE = {"file": "caches, buffers and the runtime itself", "memory": "the runtime itself"}


def show_reports(reports: Sequence[Report]) -> None:
    """One export in sentences, several in a table."""
    if not reports:
        return
    if len(reports) == 1:
        _show_report(reports[0])
    else:
        _show_table(reports)


def _show_report(report: Report) -> None:
    say = console.say
    say(
        f"[bold]{report.format} {report.layout}[/]: {report.planned_bytes:,} bytes planned, "
        f"{report.written_bytes:,} written; budget of {format_bytes(report.budget_bytes)} for "
        f"{_SCOPES[report.budget_scope]}",
        markup=True,
    )
    for runtime in report.runtimes:
        say(f"{runtime.runtime}: {', '.join(_process(runtime, report))}", indent=2)
        quality = "; ".join(_quality(runtime, report))
        if quality:
            say(f"on {_measured_on(report)}: {quality}", indent=4)
        if runtime.agreement is not None:
            agreed = runtime.agreement
            kl = f"KL {agreed.mean_kl:.1e} nats per token"
            say(f"agreement with the bundle: {kl}, same top token {agreed.same_top:.1%}", indent=4)
    if report.similarity is not None:
        say(_similarity(report), indent=2)
    for line in (*report.failures, *report.notes):
        say(f"• {line}", indent=2)


def _measured_on(report: Report) -> str:
    """Name the text of the measured figures, which are not those that predictions are of."""
    return "a text" if report.text is None else f"{report.text.tokens:,} tokens of {report.text.source}"


def _process(runtime: RuntimeReport, report: Report) -> Iterator[str]:
    """What a process of a runtime took, and what of it is no matter of the budget."""
    if runtime.memory is not None:
        memory = runtime.memory
        took = f"{format_bytes(memory.peak_bytes)} of {format_bytes(memory.predicted_bytes)} planned for its process"
        in_budget = report.planned_bytes if report.budget_scope == "file" else report.memory_bytes
        beside = memory.predicted_bytes - in_budget
        if report.budget_scope in _BESIDE and beside > 0:
            took += f" ({format_bytes(beside)} of it for {_BESIDE[report.budget_scope]}, not in the budget)"
        yield took
        anonymous, planned = memory.allocated_bytes, memory.predicted_anonymous_bytes
        yield f"{format_bytes(anonymous)} of {format_bytes(planned)} planned that the system cannot drop"
    if runtime.load_seconds is not None:
        yield f"loaded in {runtime.load_seconds:.1f} s"
    if runtime.speed is not None:
        # What an encoder does is read.
        yield f"{_speed(runtime.speed)} tokens/s"


def _speed(speed: Speed) -> str:
    """Tokens per second, never a zero that is none."""
    rate = speed.decode or speed.prefill
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def _quality(runtime: RuntimeReport, report: Report) -> Iterator[str]:
    """What was measured on a text: perplexity, and the divergence from the dense model."""
    if runtime.perplexity is not None:
        dense = report.dense_perplexity
        beside = "" if dense is None else f" (dense {dense.perplexity:.2f})"
        yield f"perplexity {runtime.perplexity.perplexity:.2f}{beside}"
    if runtime.divergence is not None:
        far = runtime.divergence
        worst = f"99.9 % of them below {format_nats(far.kl_999)}"
        predicted = report.predicted_divergence
        beside = "" if predicted is None else f" ({format_nats(predicted)} predicted)"
        mean = f"KL {format_nats(far.mean_kl)} nats per token{beside}"
        yield f"from the dense model: {mean}, {worst}, same top token {far.same_top:.1%}"


def _similarity(report: Report) -> str:
    kept = f"embeddings {report.similarity:.5f} similar to the dense model's"
    if report.similarity_spearman is None:
        return kept
    error = report.similarity_error or 0.0
    return f"{kept}; similarities of texts kept: Spearman {report.similarity_spearman:.5f}, mean error {error:.5f}"


def _show_table(reports: Sequence[Report]) -> None:
    """One row an export, by its first runtime."""
    names = ("export", "budget", "bytes written", "perplexity", "dense", "KL to dense", "tokens/s")
    table = plain_table(*names)
    for column in table.columns[1:]:
        column.justify = "right"
    for report in reports:
        runtime = report.runtimes[0] if report.runtimes else None
        own, dense = runtime and runtime.perplexity, report.dense_perplexity
        far, speed = runtime and runtime.divergence, runtime and runtime.speed
        planned = "" if report.written_bytes == report.planned_bytes else " [red]not as planned[/]"
        table.add_row(
            f"{report.format} {report.layout}",
            format_bytes(report.budget_bytes),
            f"{report.written_bytes:,}{planned}",
            f"{own.perplexity:.2f}" if own else "",
            f"{dense.perplexity:.2f}" if dense else "",
            format_nats(far.mean_kl) if far else "",
            _speed(speed) if speed else "",
        )
    console.out.print(table)
    texts = dict.fromkeys(_measured_on(report) for report in reports if report.text is not None)
    if texts:
        console.say(f"measured on {' and '.join(texts)}; KL in nats per token", style="dim")
    for report in reports:
        if report.similarity is not None:
            console.say(f"{report.format} {report.layout}: {_similarity(report)}")


def hub_name(name: str) -> str:
    """Return ``name`` as a hub takes it: at most 96 letters of ASCII, digits and single marks between them."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    name = re.sub(r"([-.])[-.]+", r"\1", name)[:96].strip("-.")
    return name.removesuffix(".git") or "model"


def show_export(plan: Plan, directory: Path) -> None:
    """Where the export is, and how to run it."""
    from acip_export.api.push import flags_of_card
    from acip_export.formats.registry import export_format

    size = format_bytes(plan.planned_bytes)
    console.say(f"\n[bold]{size}[/] in {escape(str(directory))}, as planned. Run it with:", markup=True)
    written_as = export_format(plan.format)
    name, lacking = hub_name(f"{Path(plan.model).name}-{directory.name}"), flags_of_card(directory)
    push = shlex.join(["acip-export", "push", str(directory), name, *lacking])
    commands = written_as.run_commands(plan, directory, written_as.chat_template(directory))
    if plan.task == "causal":
        console.show_command(shlex.join(["acip-export", "chat", str(directory)]), shell=True)
    for command in [c for c in commands if c.language == "console"] or commands[:1]:
        console.show_command(command.text, shell=command.language == "console")
        if command.note:
            console.say(f"({command.note})", indent=2, style="dim")
    what = f", which does not say  {'  and  '.join(lacking[::2])}" if lacking else ""
    console.say(f"Publish it, with its model card{what}:")
    console.show_command(push, shell=True)
