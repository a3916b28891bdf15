"""Print what a verification measured, and how to run an export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from acip_export.cli import output as console
from acip_export.units import format_bytes

if TYPE_CHECKING:
    from acip_export.artifacts.plan import Plan
    from acip_export.artifacts.report import Agreement, Divergence, Report


def show_reports(reports: list[Report]) -> None:
    """One row per runtime and export."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    # What others' exports are compared by; it takes the dense model and a text.
    compared = ("KL", "99.9 %", "same top") if any(_divergence(report) for report in reports) else ()
    before = ("export", "budget", "planned", "written", "runtime", "perplexity", "dense")
    for column in (*before, *(compared or ("from bundle",)), "tok/s"):
        table.add_column(column, justify="left" if column in ("export", "runtime") else "right", no_wrap=True)
    for report in reports:
        dense = "" if report.dense_perplexity is None else f"{report.dense_perplexity.perplexity:.2f}"
        for runtime in report.runtimes:
            table.add_row(
                f"{report.format} {report.layout}",
                format_bytes(report.budget_bytes),
                f"{report.planned_bytes:,}",
                f"{report.written_bytes:,}",
                runtime.runtime,
                "" if runtime.perplexity is None else f"{runtime.perplexity.perplexity:.2f}",
                dense,
                *(_compared(runtime.divergence) if compared else _agreed(runtime.agreement)),
                # What an encoder does is read.
                "" if runtime.speed is None else f"{runtime.speed.decode or runtime.speed.prefill:.0f}",
            )
    console.out.print(table)
    for report in reports:
        if report.similarity is not None and report.similarity_spearman is not None:
            error = report.similarity_error or 0.0
            console.out.print(
                f"{report.format} {report.layout}: embeddings {report.similarity:.5f} similar to the dense model's; "
                f"similarities of texts kept: Spearman {report.similarity_spearman:.5f}, mean error {error:.5f}"
            )


def _divergence(report: Report) -> Divergence | None:
    return next((runtime.divergence for runtime in report.runtimes if runtime.divergence is not None), None)


def _compared(divergence: Divergence | None) -> tuple[str, str, str]:
    """From the dense model; nothing where it was not measured."""
    if divergence is None:
        return "", "", ""
    return f"{divergence.mean_kl:.4f}", f"{divergence.kl_999:.2f}", f"{divergence.same_top:.1%}"


def _agreed(agreement: Agreement | None) -> tuple[str]:
    return ("" if agreement is None else f"{agreement.mean_kl:.1e}",)


def show_export(plan: Plan, directory: Path) -> None:
    """Where the export is, and how to run it."""
    from acip_export.formats.registry import export_format

    console.out.print(f"\n[bold]{format_bytes(plan.planned_bytes)}[/] in {directory}, as planned. Run it with:")
    written_as = export_format(plan.format)
    commands = written_as.run_commands(plan, directory, written_as.chat_template(directory))
    if plan.task == "causal":
        console.out.print(shlex.join(["acip-export", "chat", str(directory)]), markup=False, soft_wrap=True)
    for command in [c for c in commands if c.language == "console"] or commands[:1]:
        console.out.print(command.text, markup=False, soft_wrap=True)
        if command.note:
            console.out.print(f"  ({command.note})", markup=False, style="dim")
